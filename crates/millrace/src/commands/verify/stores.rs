//! The proof's ports, over Kafka, Redis and HTTP.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use change::Lsn;
use kafka::{Connection, Names, RangeReader, Start};
use redis_counters::Counters;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use verify::{CounterStore, DocumentStore, Documents, From, Log, NotVerified, Part, StoreError};
use worker::{Checkpoint, FeedError, LogBatch, LogRecord, SinkError};

/// One wait for records.
const POLL: Duration = Duration::from_millis(500);
/// A log that gives nothing for so long, though there must be more, is given up.
const SILENCE: Duration = Duration::from_secs(60);
/// Longest wait for an answer of the search process, beside what it is asked to wait.
const ANSWER: Duration = Duration::from_secs(30);
/// Longest answer, bytes: a thousand documents, of which 8 MiB are asked for at a time where their size is known.
const MAX_ANSWER_BYTES: u64 = 1 << 30;

/// The log in Kafka.
pub(super) struct KafkaLog<'a> {
    pub(super) id: String,
    pub(super) kafka: &'a Connection,
    pub(super) names: &'a Names,
}

impl KafkaLog<'_> {
    fn open(&self, from: From, end: i64) -> Result<RangeReader, NotVerified> {
        let open = |start| RangeReader::open(self.kafka, self.names, start, Some(end)).map_err(not_verified);
        let (reader, wanted) = match from {
            From::Beginning => (open(Start::Beginning)?, 0),
            From::Offset(offset) => (open(Start::Offset(offset))?, offset),
            From::Time(time) => {
                let reader = open(Start::Time(time))?;
                let first = if reader.next_offset() > 0 { open(Start::Beginning)?.next_offset() } else { 0 };
                // Where nothing was removed, there is a record from before that time, or the log is all newer.
                let wanted = if first > 0 { first + 1 } else { 0 };
                return if reader.next_offset() < wanted { Err(self.removed(first)) } else { Ok(reader) };
            }
        };
        if reader.next_offset() > wanted { Err(self.removed(reader.next_offset())) } else { Ok(reader) }
    }

    fn removed(&self, first: i64) -> NotVerified {
        let topic = self.names.log();
        NotVerified::new(
            format!(
                "topic \"{topic}\" begins at offset {first}: records that are needed to compare were removed"
            ),
            "end the oldest transactions of the source and try again; the log must be kept longer (retention.ms)",
        )
    }
}

impl Log for KafkaLog<'_> {
    fn id(&self) -> &str {
        &self.id
    }

    fn read(
        &mut self,
        from: From,
        end: i64,
        take: &mut dyn FnMut(&LogRecord<'_>) -> Result<(), NotVerified>,
    ) -> Result<(), NotVerified> {
        let mut reader = self.open(from, end)?;
        let mut batch = LogBatch::default();
        let mut heard = Instant::now();
        while reader.read(POLL, &mut batch).map_err(not_verified)? {
            (0..batch.len()).try_for_each(|place| take(&batch.get(place)))?;
            if !batch.is_empty() {
                heard = Instant::now();
            } else if heard.elapsed() >= SILENCE {
                let next = reader.next_offset();
                let what = format!("the log gives no record from offset {next} on, but a store is at {end}");
                return Err(NotVerified::new(what, "millrace status"));
            }
        }
        Ok(())
    }
}

fn not_verified(error: FeedError) -> NotVerified {
    match error {
        FeedError::Refused(refusal) => NotVerified::new(refusal.what, refusal.remedy),
        error => NotVerified::new(format!("Kafka: {error}"), ""),
    }
}

/// A counter in Redis.
pub(super) struct RedisCounter {
    pub(super) counters: Counters,
    pub(super) name: String,
}

impl CounterStore for RedisCounter {
    fn checkpoint(&mut self) -> Result<Option<Checkpoint>, StoreError> {
        let found = self.counters.checkpoints(&[&self.name]).map_err(store_error)?;
        Ok(found.into_iter().next().flatten())
    }

    fn part(&mut self, from: Option<&str>) -> Result<Part, StoreError> {
        let redis_counters::Part { checkpoint, groups, next } =
            self.counters.part(&self.name, from).map_err(store_error)?;
        Ok(Part { checkpoint, groups, next })
    }

    fn groups(&mut self, groups: &[String]) -> Result<(Option<Checkpoint>, Vec<Option<String>>), StoreError> {
        self.counters.groups(&self.name, groups).map_err(store_error)
    }
}

fn store_error(error: SinkError) -> StoreError {
    StoreError(error.to_string())
}

/// An index, as the search process serves it.
pub(super) struct HttpIndex {
    agent: ureq::Agent,
    url: String,
}

impl HttpIndex {
    pub(super) fn new(address: SocketAddr, index: &str) -> Self {
        let config = ureq::Agent::config_builder().http_status_as_error(false);
        HttpIndex { agent: config.build().into(), url: format!("http://{address}/indexes/{index}") }
    }

    /// The answer's status and body.
    fn ask(&self, body: &Value, patience: Duration) -> Result<(u16, Vec<u8>), StoreError> {
        let request = self.agent.post(format!("{}/documents/fetch", self.url));
        let request = request.config().timeout_global(Some(ANSWER + patience)).build();
        receive(request.send_json(body))
    }

    fn documents(&self, body: &Value) -> Result<Documents, StoreError> {
        match self.ask(body, Duration::ZERO)? {
            (200, body) => page(&body),
            (status, body) => Err(refused(status, &body)),
        }
    }
}

impl DocumentStore for HttpIndex {
    fn checkpoint(&mut self, wanted: Lsn, patience: Duration) -> Result<Option<Checkpoint>, StoreError> {
        let timeout = u64::try_from(patience.as_millis()).unwrap_or(0);
        let waited = self.ask(&json!({"limit": 0, "min_lsn": wanted, "timeout": timeout}), patience)?;
        if let (200, body) = waited {
            return page(&body).map(|page| Some(page.checkpoint));
        }
        // Not there yet: the index's description tells where it stands, also while it is being filled.
        #[derive(Deserialize)]
        struct Description {
            checkpoint: Option<Checkpoint>,
        }
        let request = self.agent.get(&self.url).config().timeout_global(Some(ANSWER)).build();
        match receive(request.call())? {
            (200, body) => {
                let described: Description = serde_json::from_slice(&body).map_err(unreadable)?;
                Ok(described.checkpoint)
            }
            (status, body) => Err(refused(status, &body)),
        }
    }

    fn fetch(&mut self, ids: &[String]) -> Result<Documents, StoreError> {
        self.documents(&json!({"ids": ids}))
    }

    fn page(&mut self, after: Option<&str>, limit: usize, key: &[&str]) -> Result<Documents, StoreError> {
        self.documents(&json!({"after": after, "limit": limit, "fields": key}))
    }
}

fn page(body: &[u8]) -> Result<Documents, StoreError> {
    #[derive(Deserialize)]
    struct Page<'a> {
        #[serde(borrow)]
        results: Vec<&'a RawValue>,
        checkpoint: Checkpoint,
    }
    let Page { results, checkpoint } = serde_json::from_slice(body).map_err(unreadable)?;
    let documents = results.into_iter().map(|document| document.get().to_owned()).collect();
    Ok(Documents { checkpoint, documents })
}

fn receive(
    answer: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
) -> Result<(u16, Vec<u8>), StoreError> {
    let away = |error: ureq::Error| StoreError(format!("the search process does not answer: {error}"));
    let mut answer = answer.map_err(away)?;
    let body = answer.body_mut().with_config().limit(MAX_ANSWER_BYTES).read_to_vec().map_err(away)?;
    Ok((answer.status().as_u16(), body))
}

fn refused(status: u16, body: &[u8]) -> StoreError {
    #[derive(Deserialize)]
    struct Body {
        message: String,
    }
    match serde_json::from_slice::<Body>(body) {
        Ok(Body { message }) => StoreError(message),
        Err(_) => StoreError(format!("the search process answers with status {status}")),
    }
}

fn unreadable(error: serde_json::Error) -> StoreError {
    StoreError(format!("the answer is not that of a Millrace search process: {error}"))
}
