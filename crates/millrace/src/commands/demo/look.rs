//! One look at everything: a few users in Postgres and in Redis, a search, and how far each part is behind.

use std::collections::BTreeMap;

use anyhow::Context;
use change::Lsn;
use serde::Deserialize;
use tokio_postgres::Client;

use super::mailbox::USERS;
use crate::commands::stores::{Store, Stores};
use crate::failure::Failure;
use crate::wiring::Process;

/// How many users are shown.
const SHOWN: usize = 6;
/// Asked in turn, each for some looks.
const QUERIES: [&str; 6] = ["memory", "license", "error", "\"standard output\"", "performance", "warranty"];
const LOOKS_PER_QUERY: usize = 6;

/// What was seen. The parts are read one after the other while everything goes on, so they may differ by what
/// happened in between.
pub(super) struct Look {
    pub(super) users: Vec<User>,
    pub(super) mails: i64,
    pub(super) search: Search,
    /// Name, and bytes of WAL behind Postgres; `None` while it cannot be asked.
    pub(super) behind: Vec<(&'static str, Option<u64>)>,
}

/// Unread mails of one user.
pub(super) struct User {
    pub(super) name: &'static str,
    pub(super) postgres: String,
    /// `None`: Redis does not answer.
    pub(super) redis: Option<String>,
}

/// What the search API answered.
pub(super) struct Search {
    pub(super) query: &'static str,
    pub(super) answer: Option<Answer>,
}

/// The part of the answer that is shown.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Answer {
    pub(super) estimated_total_hits: u64,
    pub(super) processing_time_ms: u64,
    hits: Vec<Hit>,
}

impl Answer {
    /// The best hit's subject.
    pub(super) fn first(&self) -> &str {
        self.hits.first().map_or("", |hit| &hit.subject)
    }
}

#[derive(Deserialize)]
struct Hit {
    subject: String,
}

/// What Postgres says.
struct Source {
    mails: i64,
    /// By user.
    unread: BTreeMap<String, String>,
    head: Lsn,
    /// The slot's.
    confirmed: Option<Lsn>,
}

/// Connections to look with.
pub(super) struct Eyes<'a> {
    process: &'a Process,
    client: Client,
    counters: redis_counters::Counters,
    stores: Stores,
    search_url: String,
    agent: ureq::Agent,
    looks: usize,
}

impl<'a> Eyes<'a> {
    pub(super) fn new(process: &'a Process) -> Result<Self, Failure> {
        let search = process.config.search.as_ref().context("the demo needs a section [search]")?;
        let agent = ureq::Agent::config_builder().timeout_global(Some(std::time::Duration::from_secs(2)));
        Ok(Eyes {
            process,
            client: process.connect(&process.admin()?)?,
            counters: process.counters()?,
            stores: Stores::new(process, &["counters.unread".to_owned(), "search.emails".to_owned()])?,
            search_url: format!("http://{}/indexes/emails/search", search.listen),
            agent: agent.build().into(),
            looks: 0,
        })
    }

    /// Fails only for Postgres; whatever else does not answer may just have been killed.
    pub(super) fn look(&mut self) -> anyhow::Result<Look> {
        let Source { mails, unread, head, confirmed } = self.postgres().context("Postgres")?;
        let ids: Vec<String> = (1..=SHOWN).map(|id| id.to_string()).collect();
        let redis = self.counters.groups("unread", &ids).ok().map(|(_, values)| values);
        let user = |(place, name): (usize, &&'static str)| {
            let id = place + 1;
            let zero = || "0".to_owned();
            let found =
                |values: &Vec<Option<String>>| values.get(place).cloned().flatten().unwrap_or_else(zero);
            User {
                name,
                postgres: unread.get(&id.to_string()).cloned().unwrap_or_else(zero),
                redis: redis.as_ref().map(found),
            }
        };
        let users = USERS.iter().enumerate().take(SHOWN).map(user).collect();
        let stores = self.stores.read();
        let behind = |lsn: Option<Lsn>| lsn.map(|lsn| head.bytes_since(lsn));
        let lsn = |place: usize| stores.get(place).and_then(|store: &Store| store.lsn);
        let behind =
            vec![("reader", behind(confirmed)), ("counters", behind(lsn(0))), ("search", behind(lsn(1)))];
        Ok(Look { users, mails, search: self.search(), behind })
    }

    fn postgres(&self) -> anyhow::Result<Source> {
        const UNREAD: &str = "SELECT user_id::text, count(*)::text FROM public.emails WHERE NOT is_read AND folder = 'inbox' \
                              GROUP BY user_id";
        const POSITIONS: &str = "SELECT (SELECT count(*) FROM public.emails), pg_current_wal_flush_lsn()::text, \
             (SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = $1)";
        let slot = self.process.config.pipeline.slot(crate::wiring::FIRST_GENERATION);
        self.process.runtime.block_on(async {
            let unread = self.client.query(UNREAD, &[]).await?;
            let unread = unread.iter().map(|row| (row.get(0), row.get(1))).collect();
            let row = self.client.query_one(POSITIONS, &[&slot]).await?;
            Ok(Source {
                mails: row.get(0),
                unread,
                head: row.get::<_, &str>(1).parse()?,
                confirmed: row.get::<_, Option<&str>>(2).map(str::parse).transpose()?,
            })
        })
    }

    fn search(&mut self) -> Search {
        let query = QUERIES[self.looks / LOOKS_PER_QUERY % QUERIES.len()];
        self.looks += 1;
        let answer = self.agent.get(&self.search_url).query("q", query).query("limit", "1").call();
        let answer = answer.ok().and_then(|mut answer| answer.body_mut().read_json().ok());
        Search { query, answer }
    }
}
