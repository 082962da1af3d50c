//! The derived stores as `status` and `wait` see them: which there are, and how far each has come.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use change::{Lsn, Refusal};
use redis_counters::Counters;
use serde::{Deserialize, Serialize};
use worker::Checkpoint;

use crate::wiring::Process;

/// How long a search process may take to say what it has.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// One store's state.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Store {
    /// `counters.unread`, `search.emails`.
    pub(crate) store: String,
    /// Postgres up to here is in the store.
    pub(crate) lsn: Option<Lsn>,
    /// Every record of the log below this offset is in the store.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) next_offset: Option<i64>,
    /// Whether it has caught up since it was last empty.
    pub(crate) ready: bool,
    /// Records that were left out on the operator's word.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) skipped: Vec<i64>,
    /// Why nothing is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) problem: Option<String>,
}

impl Store {
    fn at(name: &str, at: &Checkpoint) -> Self {
        Store {
            store: name.into(),
            lsn: Some(at.lsn),
            next_offset: Some(at.next_offset),
            ready: at.ready,
            skipped: at.skipped.clone(),
            problem: None,
        }
    }

    fn unknown(name: &str, problem: impl ToString) -> Self {
        Store {
            store: name.into(),
            lsn: None,
            next_offset: None,
            ready: false,
            skipped: Vec::new(),
            problem: Some(problem.to_string()),
        }
    }
}

/// The stores asked for, or all that are configured.
pub(crate) struct Stores {
    counters: Vec<String>,
    redis: Option<Counters>,
    indexes: Vec<String>,
    search: Option<SocketAddr>,
}

impl Stores {
    /// Refuses names that are not configured.
    pub(crate) fn new(process: &Process, wanted: &[String]) -> Result<Self, Refusal> {
        let config = &process.config;
        let counters = config.counters.iter().map(|counter| format!("counters.{}", counter.name));
        let indexes = config.search.iter().flat_map(|search| &search.indexes);
        let all: Vec<String> =
            counters.chain(indexes.map(|index| format!("search.{}", index.name))).collect();
        if let Some(unknown) = wanted.iter().find(|name| !all.contains(name)) {
            let remedy = if all.is_empty() {
                "configure one: [counters.NAME] or [search.indexes.NAME]".to_owned()
            } else {
                format!("name one of these: {}", all.join(", "))
            };
            return Err(Refusal::new(format!("there is no store `{unknown}`"), remedy));
        }
        let named = |kind: &str| -> Vec<String> {
            let asked = all.iter().filter(|name| wanted.is_empty() || wanted.contains(name));
            asked.filter_map(|name| name.strip_prefix(kind)).map(str::to_owned).collect()
        };
        let (counters, indexes) = (named("counters."), named("search."));
        let redis = if counters.is_empty() { None } else { Some(process.counters()?) };
        Ok(Stores { counters, redis, indexes, search: config.search.as_ref().map(|search| search.listen) })
    }

    /// Reads all of them now.
    pub(crate) fn read(&mut self) -> Vec<Store> {
        let mut stores = self.read_counters();
        stores.extend(self.read_indexes());
        stores
    }

    fn read_counters(&mut self) -> Vec<Store> {
        let Some(redis) = &mut self.redis else { return Vec::new() };
        let names: Vec<&str> = self.counters.iter().map(String::as_str).collect();
        let found = redis.checkpoints(&names);
        let store = |place: usize, name: &String| {
            let name = format!("counters.{name}");
            match &found {
                Ok(found) => match &found[place] {
                    Some(at) => Store::at(&name, at),
                    None => Store::unknown(&name, "nothing is there yet: has `millrace counters` run?"),
                },
                Err(error) => Store::unknown(&name, error.to_string().lines().next().unwrap_or_default()),
            }
        };
        self.counters.iter().enumerate().map(|(place, name)| store(place, name)).collect()
    }

    fn read_indexes(&self) -> Vec<Store> {
        let Some(address) = self.search.filter(|_| !self.indexes.is_empty()) else { return Vec::new() };
        let listing = list_indexes(reachable(address));
        let store = |name: &String| {
            let store = format!("search.{name}");
            let index = match &listing {
                Ok(listing) => listing.results.iter().find(|index| index.uid == *name),
                Err(problem) => return Store::unknown(&store, problem),
            };
            match index.map(|index| &index.checkpoint) {
                Some(Some(at)) => Store::at(&store, at),
                Some(None) => Store::unknown(&store, "it is being opened or emptied"),
                None => Store::unknown(&store, "the running search process was started without it"),
            }
        };
        self.indexes.iter().map(store).collect()
    }
}

/// An address to connect to for one that is listened on.
pub(crate) fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}

/// The answer to `GET /indexes`.
#[derive(Deserialize)]
struct Listing {
    results: Vec<Index>,
}

#[derive(Deserialize)]
struct Index {
    uid: String,
    /// Absent while there is nothing to read.
    checkpoint: Option<Checkpoint>,
}

/// What the search process says of its indexes.
fn list_indexes(address: SocketAddr) -> Result<Listing, String> {
    let config = ureq::Agent::config_builder().timeout_global(Some(ANSWER_TIMEOUT));
    let agent: ureq::Agent = config.build().into();
    let answer = agent.get(format!("http://{address}/indexes")).call();
    let mut answer =
        answer.map_err(|error| format!("the search process does not answer at {address}: {error}"))?;
    answer
        .body_mut()
        .read_json()
        .map_err(|error| format!("{address} does not answer as `millrace search` does: {error}"))
}
