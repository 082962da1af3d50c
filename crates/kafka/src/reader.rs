//! One partition, read by nobody's group: committed records in order, and where they end.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use change::{NEW_LOG, Refusal};
use rdkafka::client::Client;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError as ClientError, RDKafkaErrorCode as Code};
use rdkafka::message::{BorrowedMessage, Message};
use rdkafka::{ClientContext, Offset, TopicPartitionList};

use crate::connection::Reports;
use crate::{Connection, KafkaError, Names};

/// The most that librdkafka fetches ahead for such a reader (KiB).
const PREFETCH_KIB: &str = "16384";

/// Clients ask this often who leads the partitions (ms). A leader that was cut off from the others does not know that
/// it was replaced, and goes on answering.
pub(crate) const LEADERS_MS: (&str, &str) = ("topic.metadata.refresh.interval.ms", "5000");

/// One wait for a record, of those that are repeated until a limit.
const LOOK: Duration = Duration::from_millis(100);

/// What [`PartitionReader::next`] found.
pub(crate) enum Next<'a> {
    /// A committed record.
    Record(BorrowedMessage<'a>),
    /// Nothing more is committed so far. Said once for each end.
    End,
    /// Nothing came in time.
    Nothing,
}

pub(crate) struct PartitionReader {
    consumer: BaseConsumer<Reports>,
    topic: String,
    outage: Duration,
    absence: Absence,
}

impl PartitionReader {
    /// A reader of partition 0 of `topic` that reads nothing yet. Somebody waits until it has come to an end, of which the
    /// broker tells when it has waited for more.
    pub(crate) fn new(connection: &Connection, names: &Names, topic: String) -> Result<Self, KafkaError> {
        Self::with(connection, names, topic, "1", "10")
    }

    /// The same for one that follows a topic and is in no hurry: few records are told of after 100 ms, not one by one,
    /// which costs the broker more than to take them.
    pub(crate) fn follower(
        connection: &Connection,
        names: &Names,
        topic: String,
    ) -> Result<Self, KafkaError> {
        Self::with(connection, names, topic, "65536", "100")
    }

    fn with(
        connection: &Connection,
        names: &Names,
        topic: String,
        min_bytes: &str,
        wait_ms: &str,
    ) -> Result<Self, KafkaError> {
        let mut config = connection.client(&[
            LEADERS_MS,
            ("fetch.queue.backoff.ms", "5"),
            ("fetch.error.backoff.ms", "100"),
            ("fetch.min.bytes", min_bytes),
            ("fetch.wait.max.ms", wait_ms),
            ("queued.max.messages.kbytes", PREFETCH_KIB),
        ]);
        config
            .set("group.id", names.no_group())
            .set("isolation.level", "read_committed")
            .set("enable.auto.commit", "false")
            .set("enable.partition.eof", "true")
            .set("auto.offset.reset", "error");
        let consumer = config
            .create_with_context(Reports::default())
            .map_err(|error| KafkaError::of("cannot make a Kafka consumer", &error))?;
        Ok(PartitionReader {
            consumer,
            topic,
            outage: connection.outage(),
            absence: Absence::new(connection),
        })
    }

    /// First offset, and offset after the last that is committed with all before it (the last stable offset).
    pub(crate) fn bounds(&self) -> Result<(i64, i64), KafkaError> {
        watermarks(&self.consumer, &self.topic, self.outage)
    }

    /// The offset of the first record at or after a time (milliseconds since the epoch); `None` for no such.
    pub(crate) fn offset_at(&self, time_ms: i64) -> Result<Option<i64>, KafkaError> {
        let error = |error| self.explain(&error);
        let mut times = TopicPartitionList::new();
        times.add_partition_offset(&self.topic, 0, Offset::Offset(time_ms)).map_err(error)?;
        let found = self.consumer.offsets_for_times(times, self.outage).map_err(error)?;
        let offset = found.find_partition(&self.topic, 0).map(|element| element.offset());
        Ok(offset.and_then(|offset| match offset {
            Offset::Offset(offset) => Some(offset),
            _ => None,
        }))
    }

    /// Reads from `offset` on.
    pub(crate) fn seek(&mut self, offset: i64) -> Result<(), KafkaError> {
        let mut place = TopicPartitionList::new();
        place
            .add_partition_offset(&self.topic, 0, Offset::Offset(offset))
            .and_then(|()| self.consumer.assign(&place))
            .map_err(|error| self.explain(&error))
    }

    /// Reads no further until the next seek.
    pub(crate) fn rest(&mut self) -> Result<(), KafkaError> {
        self.consumer.unassign().map_err(|error| self.explain(&error))
    }

    /// What comes next, waiting for it at most `timeout`.
    pub(crate) fn next(&mut self, timeout: Duration) -> Result<Next<'_>, KafkaError> {
        match self.consumer.poll(timeout) {
            Some(Ok(message)) => {
                self.absence.over();
                Ok(Next::Record(message))
            }
            Some(Err(ClientError::PartitionEOF(_))) => {
                self.absence.over();
                Ok(Next::End)
            }
            Some(Err(error)) if !is_outage(&error) => Err(self.explain(&error)),
            other => {
                if let Some(Err(_)) = other {
                    self.absence.begun();
                }
                self.absence.check(self.consumer.client(), &self.topic)?;
                Ok(Next::Nothing)
            }
        }
    }

    /// Gives what is committed within these [`bounds`](Self::bounds) to `take`, in order, until it breaks. What is
    /// written meanwhile may come too, but is not waited for: under traffic there is always more.
    pub(crate) fn read_all(
        &mut self,
        (start, end): (i64, i64),
        mut take: impl FnMut(&BorrowedMessage<'_>) -> Result<ControlFlow<()>, KafkaError>,
    ) -> Result<(), KafkaError> {
        if start >= end {
            return Ok(());
        }
        self.seek(start)?;
        let (mut heard, limit) = (Instant::now(), self.outage);
        let (mut next, mut looked_again) = (start, false);
        loop {
            match self.next(LOOK)? {
                Next::Record(message) => {
                    heard = Instant::now();
                    next = message.offset() + 1;
                    if take(&message)?.is_break() || next >= end {
                        return Ok(());
                    }
                }
                // A transaction's marker is no record, and has the last offset.
                Next::End if looked_again || next + 1 >= end => return Ok(()),
                // More markers, or an end that a new leader does not know yet.
                Next::End if heard.elapsed() < limit => {
                    looked_again = self.bounds()?.1 >= end;
                    self.seek(next)?;
                }
                Next::End => {
                    let what =
                        format!("topic \"{}\" ends before offset {end}, which was committed", self.topic);
                    return Err(KafkaError::Unavailable(what));
                }
                Next::Nothing if heard.elapsed() < limit => {}
                Next::Nothing => {
                    return Err(KafkaError::Unavailable(format!(
                        "topic \"{}\" has given nothing for {limit:?}, neither records nor their end",
                        self.topic
                    )));
                }
            }
        }
    }

    pub(crate) fn topic(&self) -> &str {
        &self.topic
    }

    fn explain(&self, error: &ClientError) -> KafkaError {
        explain(error, &self.topic, self.consumer.client(), self.consumer.context())
    }
}

/// How long the brokers have been away. librdkafka says when they go and reconnects by itself, but does not say
/// that they are back before a record comes.
pub(crate) struct Absence {
    since: Option<Instant>,
    limit: Duration,
}

impl Absence {
    /// The longest question whether they are back.
    const PROBE: Duration = Duration::from_secs(1);

    pub(crate) fn new(connection: &Connection) -> Self {
        Absence { since: None, limit: connection.outage() }
    }

    pub(crate) fn begun(&mut self) {
        self.since.get_or_insert_with(Instant::now);
    }

    pub(crate) fn over(&mut self) {
        self.since = None;
    }

    /// Fails when they have been away for longer than the limit, and still are.
    pub(crate) fn check<C: ClientContext>(
        &mut self,
        client: &Client<C>,
        topic: &str,
    ) -> Result<(), KafkaError> {
        let Some(since) = self.since.filter(|since| since.elapsed() >= self.limit) else { return Ok(()) };
        match client.fetch_metadata(Some(topic), Self::PROBE) {
            Ok(_) => self.over(),
            Err(error) => {
                let doing =
                    format!("Kafka has been away for {:?}: cannot read topic \"{topic}\"", since.elapsed());
                return Err(KafkaError::of(&doing, &error));
            }
        }
        Ok(())
    }
}

/// What it means that a topic cannot be read.
pub(crate) fn explain<C: ClientContext>(
    error: &ClientError,
    topic: &str,
    client: &Client<C>,
    reports: &Reports,
) -> KafkaError {
    // A fatal error's code says no more than that it is one.
    let fatal = client.fatal_error().map(|(code, _)| code);
    match fatal.or(error.rdkafka_error_code()) {
        Some(Code::AutoOffsetReset | Code::OffsetOutOfRange | Code::LogTruncation) => out_of_range(topic),
        Some(Code::FencedInstanceId) => KafkaError::Fenced,
        _ => KafkaError::of(&format!("cannot read topic \"{topic}\""), error).with_report(reports),
    }
}

/// The place to read from is not there, and no other would do.
pub(crate) fn out_of_range(topic: &str) -> KafkaError {
    KafkaError::Refused(Refusal::new(
        format!(
            "topic \"{topic}\" does not hold the offset to read from: retention has removed it, or the topic was \
             truncated or created anew"
        ),
        NEW_LOG,
    ))
}

/// Whether librdkafka mends this by itself once the brokers are back.
pub(crate) fn is_outage(error: &ClientError) -> bool {
    matches!(
        error.rdkafka_error_code(),
        Some(Code::AllBrokersDown | Code::BrokerTransportFailure | Code::Resolve | Code::OperationTimedOut)
    )
}

/// First offset and end offset of a topic's partition 0; the end is of the kind that the client's
/// `isolation.level` says.
pub(crate) fn watermarks(
    client: &BaseConsumer<Reports>,
    topic: &str,
    timeout: Duration,
) -> Result<(i64, i64), KafkaError> {
    client.fetch_watermarks(topic, 0, timeout).map_err(|error| {
        KafkaError::of(&format!("cannot learn the offsets of topic \"{topic}\""), &error)
            .with_report(client.context())
    })
}
