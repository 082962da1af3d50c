//! The derived stores as `status` and `wait` see them: which there are, and how far each has come.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use change::{Lsn, Refusal};
use redis_counters::Counters;
use serde::{Deserialize, Serialize};
use worker::{Checkpoint, LastRecord, Stopped};

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
    /// Which of the pipeline's logs it follows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) generation: Option<u32>,
    /// Every record of the log below this offset is in the store.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) next_offset: Option<i64>,
    /// Whether it has caught up since it was last empty, under its present definition.
    pub(crate) ready: bool,
    /// The copy that is being built to take its place.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) rebuild: Option<Rebuild>,
    /// Records that were left out on the operator's word.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) skipped: Vec<i64>,
    /// Why it has stopped, and at which record of the log.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) stopped: Option<Stopped>,
    /// Why nothing is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) problem: Option<String>,
    /// The record that its checkpoint names as the last one applied.
    #[serde(skip)]
    pub(crate) last: Option<LastRecord>,
}

/// A store that is being built anew.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub(crate) struct Rebuild {
    /// Every record of the log below this offset is in the copy; absent before it has begun.
    pub(crate) next_offset: Option<i64>,
}

impl Store {
    fn at(name: &str, at: &Checkpoint) -> Self {
        Store {
            store: name.into(),
            lsn: Some(at.lsn),
            generation: Some(at.generation),
            next_offset: Some(at.next_offset),
            ready: at.ready,
            rebuild: None,
            skipped: at.skipped.clone(),
            stopped: at.stopped_at().cloned(),
            problem: None,
            last: at.last_record(),
        }
    }

    /// The same, under the definition that is configured, and with its copy.
    fn defined(mut self, definition: &str, shown: Option<&Checkpoint>, copy: Option<Rebuild>) -> Self {
        self.ready &= shown.is_some_and(|shown| shown.is_of(definition));
        self.rebuild = copy;
        self
    }

    fn unknown(name: &str, problem: impl ToString) -> Self {
        Store {
            store: name.into(),
            lsn: None,
            generation: None,
            next_offset: None,
            ready: false,
            rebuild: None,
            skipped: Vec::new(),
            stopped: None,
            problem: Some(problem.to_string()),
            last: None,
        }
    }
}

/// The stores asked for, or all that are configured.
pub(crate) struct Stores {
    counters: Vec<String>,
    redis: Option<Counters>,
    indexes: Vec<String>,
    search: Option<SocketAddr>,
    /// Hashes of the definitions, by the store's name.
    definitions: BTreeMap<String, String>,
}

/// The configured stores and the hashes of their definitions: counters first.
pub(crate) fn configured(process: &Process) -> Vec<(String, String)> {
    let config = &process.config;
    let counters = config.counters.iter();
    let counters = counters.map(|counter| (format!("counters.{}", counter.name), counter.definition.hash()));
    let indexes = config.search.iter().flat_map(|search| &search.indexes);
    counters.chain(indexes.map(|index| (format!("search.{}", index.name), index.hash()))).collect()
}

impl Stores {
    /// Refuses names that are not configured.
    pub(crate) fn new(process: &Process, wanted: &[String]) -> Result<Self, Refusal> {
        let config = &process.config;
        let configured = configured(process);
        let all: Vec<&String> = configured.iter().map(|(name, _)| name).collect();
        if let Some(unknown) = wanted.iter().find(|name| !all.contains(name)) {
            let remedy = if all.is_empty() {
                "configure one: [counters.NAME] or [search.indexes.NAME]".to_owned()
            } else {
                format!("name one of these: {}", names(&all))
            };
            return Err(Refusal::new(format!("there is no store `{unknown}`"), remedy));
        }
        let named = |kind: &str| -> Vec<String> {
            let asked = all.iter().filter(|name| wanted.is_empty() || wanted.contains(*name));
            asked.filter_map(|name| name.strip_prefix(kind)).map(str::to_owned).collect()
        };
        let (counters, indexes) = (named("counters."), named("search."));
        let redis = if counters.is_empty() { None } else { Some(process.counters()?) };
        let search = config.search.as_ref().map(|search| search.listen);
        Ok(Stores { counters, redis, indexes, search, definitions: configured.into_iter().collect() })
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
        let found = redis.checkpoints(&names).and_then(|found| Ok((found, redis.copies(&names)?)));
        let store = |place: usize, name: &String| {
            let name = format!("counters.{name}");
            match &found {
                Ok((shown, copies)) => {
                    let (shown, copy) = (shown[place].as_ref(), &copies[place]);
                    let store = match shown.or(copy.as_ref().and_then(Option::as_ref)) {
                        Some(at) => Store::at(&name, at),
                        None => Store::unknown(&name, "nothing is there yet: has `millrace counters` run?"),
                    };
                    let offset = |at: &Option<Checkpoint>| at.as_ref().map(|at| at.next_offset);
                    let copy = copy.as_ref().map(|at| Rebuild { next_offset: offset(at) });
                    store.defined(&self.definitions[&name], shown, copy)
                }
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
            match index.map(|index| (index, &index.checkpoint)) {
                Some((index, Some(at))) => {
                    let copy = index.rebuild.as_ref();
                    let copy = copy.map(|copy| Rebuild { next_offset: Some(copy.next_offset) });
                    Store::at(&store, at).defined(&self.definitions[&store], Some(at), copy)
                }
                Some((_, None)) => Store::unknown(&store, "it is being opened, or its build has not begun"),
                None => Store::unknown(&store, "the running search process was started without it"),
            }
        };
        self.indexes.iter().map(store).collect()
    }
}

/// Names in a row.
pub(crate) fn names(names: &[impl AsRef<str>]) -> String {
    names.iter().map(AsRef::as_ref).collect::<Vec<_>>().join(", ")
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
    /// Of the copy that is being built.
    rebuild: Option<Checkpoint>,
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
