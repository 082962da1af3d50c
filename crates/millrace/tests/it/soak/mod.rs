//! A random workload of changes, DDL and kills, and an oracle that knows the right answer at every LSN.
//!
//! All transactions commit one after the other, and after each the queries of all stores are asked in SQL and kept with
//! the LSN. A sampler reads each store together with its checkpoint, all the while. A store that is ready at an LSN must
//! have the answer that was kept for the last transaction before it. Between two LSNs that were kept both answers are
//! right, for the second transaction's commit record is anywhere between them.
//!
//! A change of the catalog that no row event tells is noticed before the table's next change, or when the source is idle,
//! so one of the two follows each. For what else could follow the promise is weaker: see "DDL" in README.md.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use change::Lsn;
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{Rng, SeedableRng};
use testkit::services::{Session, wait_until};

use crate::harness::{Pipeline, ROLES, Role, SOON, fetch, tail, text};
use crate::mailbox::groups;

mod operations;

use operations::{COUNTERS, INDEXES, OPERATIONS, Operation, Refusal, TABLES};

const STORES: usize = COUNTERS.len() + INDEXES.len();
/// The longest time on one set of servers; each has its own seed.
const ROUND: Duration = Duration::from_secs(600);

#[test]
fn stores_are_right_whenever_they_are_ready_whatever_is_altered() {
    let seed = number("MILLRACE_SOAK_SEED").unwrap_or(1);
    Workload::start(seed).run(Duration::from_secs(20));
}

#[test]
#[ignore = "an hour; scripts/test --soak runs it"]
fn soak() {
    let end = Instant::now() + Duration::from_secs(number("MILLRACE_SOAK_SECONDS").unwrap_or(3600));
    let first = number("MILLRACE_SOAK_SEED").unwrap_or_else(rand::random);
    for seed in first.. {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        Workload::start(seed).run(left.min(ROUND));
    }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

/// What SQL says after a transaction.
struct State {
    lsn: Lsn,
    /// The transaction, for messages.
    sql: String,
    /// Each store's answer; `None` while its table is not there.
    answers: Vec<Option<String>>,
}

struct Workload {
    rng: StdRng,
    pipeline: Pipeline,
    session: Session,
    /// A transaction that is open beside the others, and the table that it has changed.
    open: Option<(Session, usize)>,
    away: Vec<Role>,
    /// The reader has ended with a refusal, which the operation that goes on may bring about.
    refused: bool,
    refusal: Refusal,
    history: Vec<State>,
    sampler: Sampler,
    /// How often what was done.
    counts: BTreeMap<&'static str, u64>,
    /// The last number that an operation got.
    last: u64,
}

impl Workload {
    fn start(seed: u64) -> Self {
        eprintln!("replay with MILLRACE_SOAK_SEED={seed}");
        let mut pipeline = Pipeline::new();
        pipeline.postgres.sql("app", "DROP TABLE emails, users, points");
        pipeline.postgres.sql("app", operations::SCHEMA);
        let names: Vec<String> = TABLES.iter().map(|table| format!("\"{table}\"")).collect();
        let extra = format!(
            "[reader]\nheartbeat_interval_ms = 2000\nbatch_kb = 64\n[snapshot]\nround_kb = 1\n[redis]\nurl = \"{}\"\n\
             [search]\ndirectory = \"{}\"\nlisten = \"{}\"\n{}",
            pipeline.redis.url(),
            pipeline.search_directory().display(),
            pipeline.search_url().replace("http://", ""),
            operations::stores(),
        );
        pipeline.configure_tables(&names.join(", "), &extra);
        pipeline.succeed(&["setup"]);
        ROLES.into_iter().for_each(|role| pipeline.spawn(role));
        pipeline.succeed(&["wait", "--timeout", "90s"]);
        let session = pipeline.postgres.session("app");
        session.sql("SET timezone = 'UTC'");
        let mut workload = Workload {
            rng: StdRng::seed_from_u64(seed),
            sampler: Sampler::start(&pipeline),
            pipeline,
            session,
            open: None,
            away: Vec::new(),
            refused: false,
            refusal: Refusal::Never,
            history: Vec::new(),
            counts: BTreeMap::new(),
            last: 10,
        };
        workload.note("the beginning", None);
        workload
    }

    fn run(mut self, time: Duration) {
        let end = Instant::now() + time;
        let mut deck: Vec<&Operation> = Vec::new();
        while Instant::now() < end {
            if deck.is_empty() {
                deck = OPERATIONS.iter().collect();
                deck.shuffle(&mut self.rng);
            }
            self.changes();
            self.operate(deck.pop().expect("an operation"));
        }
        let lsn = self.settle(true);
        self.judge();
        let said = self.pipeline.millrace(&["verify"]);
        assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stdout));
        let (samples, ready) = self.sampler.stop();
        eprintln!("{:?}\n{samples} samples, {ready} of them ready and new; the end is {lsn}", self.counts);
        assert!(ready > 100, "stores were ready: {ready}");
    }

    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    /// Some changes of any table.
    fn changes(&mut self) {
        for _ in 0..self.rng.random_range(0..5) {
            if self.rng.random_bool(0.3) {
                thread::sleep(Duration::from_millis(self.rng.random_range(0..40)));
            }
            let free = self.open.is_none();
            let table = self.rng.random_range(0..TABLES.len());
            let statements = self.rng.random_range(1..4);
            let sql: String = (0..statements).map(|_| operations::change(&mut self.rng, table)).collect();
            if free && self.rng.random_bool(0.1) {
                let session = self.pipeline.postgres.session("app");
                session.sql(&format!("BEGIN; {sql}"));
                self.open = Some((session, table));
                self.count("open transactions");
            } else if !self.is_open(table) {
                self.count("changes");
                drop(self.commit(&sql));
            } else if self.rng.random_bool(0.5) {
                self.close();
            }
        }
    }

    fn is_open(&self, table: usize) -> bool {
        self.open.as_ref().is_some_and(|(_, open)| *open == table)
    }

    /// Commits the open transaction.
    fn close(&mut self) {
        if let Some((session, _)) = self.open.take() {
            session.sql("COMMIT");
            self.note("COMMIT of the open transaction", None);
        }
    }

    fn operate(&mut self, operation: &'static Operation) {
        if self.is_open(operation.table) || operation.refusal != Refusal::Never {
            self.close();
        }
        self.count(operation.what);
        self.refusal = operation.refusal;
        self.last += 1;
        for line in operation.sql.lines() {
            if line.trim() == operations::READY {
                self.settle(true);
                continue;
            }
            let mut sql = line.trim().replace("$N", &self.last.to_string());
            while sql.contains("$W") {
                sql = sql.replacen("$W", &operations::change(&mut self.rng, operation.table), 1);
            }
            self.commit(&sql).unwrap_or_else(|error| panic!("{}: {sql}: {error:?}", operation.what));
            let touched = !operation.unseen
                && self.rng.random_bool(0.7)
                && self.commit(&operations::touch(operation.table)).is_ok();
            if !touched {
                self.settle(false);
            }
        }
        if operation.refusal != Refusal::Never {
            self.changes();
            self.settle(true);
            if operation.refusal == Refusal::NewLog {
                // Until all have gone over to the new log the reader does not end when it refuses one of the two.
                wait_until("the end of the old log", SOON, || {
                    let retired = self.pipeline.millrace(&["generation", "retire", "--yes"]);
                    let said = String::from_utf8_lossy(&retired.stdout);
                    (retired.status.success() && said.contains("is removed")).then_some(())
                });
            }
        } else if self.rng.random_bool(0.4) {
            self.settle(true);
        }
        self.refusal = Refusal::Never;
    }

    /// Runs a transaction while processes are killed and a standby is missing, as it comes.
    fn commit(&mut self, sql: &str) -> Result<(), tokio_postgres::Error> {
        self.kill_some();
        let waits = self.rng.random_bool(0.03) && !sql.starts_with("VACUUM") && !sql.starts_with("CLUSTER");
        let shown = match waits {
            true => self.commit_without_standby(sql)?,
            false => self.session.try_sql(sql).map(|_| None)?,
        };
        self.note(sql, shown);
        Ok(())
    }

    /// The commit is in the stream and not visible for a while. Returns an LSN after its record.
    fn commit_without_standby(&mut self, sql: &str) -> Result<Option<Lsn>, tokio_postgres::Error> {
        self.count("missing standby");
        self.pipeline.postgres.sql("app", "ALTER SYSTEM SET synchronous_standby_names = 'missing'");
        self.pipeline.postgres.reload();
        let (config, sql) = (self.pipeline.postgres.session_config("app"), sql.to_owned());
        let waiting = thread::spawn(move || {
            let session = Session::connect(&config)?;
            session.try_sql("SET application_name = 'waiting'; SET timezone = 'UTC'")?;
            session.try_sql(&sql)
        });
        let mine = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND application_name = 'waiting'";
        wait_until("a commit that waits", SOON, || {
            (waiting.is_finished() || self.pipeline.postgres.value("app", mine) == "1").then_some(())
        });
        let lsn = (!waiting.is_finished()).then(|| self.insert_lsn());
        for _ in 0..self.rng.random_range(1..4) {
            thread::sleep(Duration::from_millis(self.rng.random_range(100..1000)));
            self.kill_some();
        }
        self.pipeline.postgres.sql("app", "ALTER SYSTEM RESET synchronous_standby_names");
        self.pipeline.postgres.reload();
        waiting.join().expect("no panic").map(|_| lsn)
    }

    fn insert_lsn(&self) -> Lsn {
        let lsn = self.pipeline.postgres.value("app", "SELECT pg_current_wal_insert_lsn()");
        lsn.parse().expect("an LSN")
    }

    /// Keeps what SQL says now.
    fn note(&mut self, sql: &str, lsn: Option<Lsn>) {
        let lsn = lsn.unwrap_or_else(|| self.insert_lsn());
        let counters = COUNTERS.iter().map(|(_, query)| {
            let rows = self.session.try_sql(query).ok()?;
            Some(format!("{:?}", groups(rows)))
        });
        let documents = INDEXES.iter().map(|(_, query, _)| {
            let rows = self.session.try_sql(query).ok()?.into_iter();
            let row = |row: Vec<Option<String>>| row.into_iter().map(|v| v.unwrap_or_else(|| "null".into()));
            let rows: Vec<Vec<String>> = rows.map(|r| row(r).collect()).collect();
            Some(sorted(rows))
        });
        let answers = counters.chain(documents).collect();
        self.history.push(State { lsn, sql: sql.to_owned(), answers });
        self.judge();
    }

    /// Compares every new sample with what was kept.
    fn judge(&mut self) {
        let samples = std::mem::take(&mut self.sampler.seen().ready);
        for Sample { store, lsn, content } in samples {
            let next = self.history.partition_point(|state| state.lsn <= lsn);
            let around = &self.history[next.saturating_sub(1)..self.history.len().min(next + 1)];
            let right = |state: &State| state.answers[store].as_ref().is_none_or(|answer| *answer == content);
            if around.iter().any(right) {
                continue;
            }
            let before = &self.history[next.saturating_sub(25)..self.history.len().min(next + 5)];
            for State { lsn, sql, answers } in before {
                eprintln!("{lsn} {sql}\n    {}", answers[store].as_deref().unwrap_or("no such table"));
            }
            let answers: Vec<&Option<String>> = around.iter().map(|state| &state.answers[store]).collect();
            panic!("{} is ready at {lsn} with\n{content}\nand not {answers:?}", name(store));
        }
    }

    /// Lets the log come to what was committed so far, and the stores as well; `ready`: until they are ready, for which
    /// no transaction may be open, since a table that is read again waits for it.
    fn settle(&mut self, ready: bool) -> Lsn {
        if ready {
            self.close();
        }
        let lsn = self.history.last().expect("the beginning").lsn;
        let start = Instant::now();
        loop {
            while let Some(role) = self.away.pop() {
                self.pipeline.spawn(role);
            }
            self.look_after(ready);
            if self.refused && !ready {
                return lsn;
            }
            let must_end = self.refusal == Refusal::NewLog;
            let behind = |(_, (at, is_ready)): &(usize, (Lsn, bool))| *at < lsn || (ready && !is_ready);
            let latest = self.sampler.seen().latest;
            let late = latest.into_iter().enumerate().find(behind);
            match late {
                None if !(must_end && ready) => return lsn,
                _ => {}
            }
            if start.elapsed() > SOON {
                let late = late.map(|(store, at)| (name(store), at));
                panic!("the stores do not come to {lsn}: {late:?}\n{}", self.last_transactions());
            }
            thread::sleep(Duration::from_millis(10));
            self.judge();
        }
    }

    fn last_transactions(&self) -> String {
        let last = &self.history[self.history.len().saturating_sub(25)..];
        last.iter().map(|state| format!("{} {}\n", state.lsn, state.sql)).collect()
    }

    /// Notices processes that ended by themselves; `mend`: what may have ended is started again.
    fn look_after(&mut self, mend: bool) {
        for role in ROLES {
            if self.away.contains(&role) || (role == Role::Reader && self.refused) {
                continue;
            }
            let Some(status) = self.pipeline.running_process(role).ended() else { continue };
            let may = role == Role::Reader && status.code() == Some(3) && self.refusal != Refusal::Never;
            let log = tail(&self.pipeline.log(role.command()));
            assert!(may, "{role:?} ended by itself: {status}\n{log}\n{}", self.last_transactions());
            self.refused = true;
            self.count("refusals");
        }
        if self.refused && mend {
            match self.refusal {
                Refusal::NewLog => self.pipeline.succeed(&["generation", "new"]),
                _ => self.pipeline.succeed(&["setup"]),
            };
            self.pipeline.spawn(Role::Reader);
            self.refused = false;
            self.refusal = Refusal::Undone;
        }
    }

    fn kill_some(&mut self) {
        self.look_after(false);
        if !self.away.is_empty() && self.rng.random_bool(0.3) {
            for role in std::mem::take(&mut self.away) {
                self.pipeline.spawn(role);
            }
        }
        let role = [Role::Reader, Role::Reader, Role::Counters, Role::Search][self.rng.random_range(0..4)];
        let gone = self.away.contains(&role) || (role == Role::Reader && self.refused);
        if self.rng.random_bool(0.04) && !gone {
            self.pipeline.kill(role);
            self.away.push(role);
            self.count("kills");
        }
    }
}

fn name(store: usize) -> String {
    match COUNTERS.get(store) {
        Some((name, _)) => format!("counter {name}"),
        None => format!("index {}", INDEXES[store - COUNTERS.len()].0),
    }
}

/// Rows as one text, whatever their order.
fn sorted(mut rows: Vec<Vec<String>>) -> String {
    rows.sort();
    format!("{rows:?}")
}

/// A store that said it was ready.
struct Sample {
    store: usize,
    lsn: Lsn,
    content: String,
}

/// What the sampler has seen.
#[derive(Default)]
struct Seen {
    stop: bool,
    samples: u64,
    judged: u64,
    /// To be judged: each store's samples that differ from the one before.
    ready: Vec<Sample>,
    /// The last sample of each store: its LSN, and whether it was ready.
    latest: [(Lsn, bool); STORES],
}

/// Reads every store together with its checkpoint, again and again.
struct Sampler {
    seen: Arc<Mutex<Seen>>,
    threads: Vec<JoinHandle<()>>,
}

impl Sampler {
    fn start(pipeline: &Pipeline) -> Self {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let mut redis = pipeline.redis.connect();
        let counters = looking(&seen, move |see| {
            let mut all = redis::pipe();
            all.atomic();
            for (name, query) in COUNTERS {
                all.cmd(if query.contains("GROUP BY") { "HGETALL" } else { "GET" }).arg(name);
                all.cmd("HMGET").arg(format!("millrace:mailbox:{name}")).arg(&["lsn", "state"]);
            }
            let Ok(answers) = all.query::<Vec<redis::Value>>(&mut redis) else { return };
            for (store, pair) in answers.chunks(2).enumerate() {
                let (lsn, state): (Option<String>, Option<String>) =
                    redis::from_redis_value(pair[1].clone()).expect("two fields");
                let content: BTreeMap<String, String> = match COUNTERS[store].1.contains("GROUP BY") {
                    true => redis::from_redis_value(pair[0].clone()).expect("a hash"),
                    false => {
                        let value: Option<String> =
                            redis::from_redis_value(pair[0].clone()).expect("a string");
                        value.into_iter().map(|value| (String::new(), value)).collect()
                    }
                };
                let lsn = lsn.and_then(|lsn| lsn.parse().ok()).unwrap_or_default();
                see(store, lsn, state.as_deref() == Some("ready"), format!("{content:?}"));
            }
        });
        let url = pipeline.search_url();
        let indexes = looking(&seen, move |see| {
            for (place, (name, query, _)) in INDEXES.iter().enumerate() {
                let Some(page) = fetch(&format!("{url}/indexes/{name}/documents?limit=1000")) else {
                    continue;
                };
                let Some(documents) = page["results"].as_array() else { continue };
                let columns = query.trim_start_matches("SELECT ").split(" FROM ").next().expect("columns");
                let fields = |document: &serde_json::Value| {
                    columns.split(", ").map(|column| text(&document[column])).collect::<Vec<_>>()
                };
                let ready = page["checkpoint"]["ready"] == true;
                let lsn = text(&page["checkpoint"]["lsn"]).parse().unwrap_or_default();
                see(COUNTERS.len() + place, lsn, ready, sorted(documents.iter().map(fields).collect()));
            }
        });
        Sampler { seen, threads: vec![counters, indexes] }
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().expect("nobody panics with it")
    }

    /// How many samples there were, and how many were judged.
    fn stop(self) -> (u64, u64) {
        self.seen().stop = true;
        let seen = self.seen.clone();
        for thread in self.threads {
            thread.join().expect("the sampler reads what it can");
        }
        let seen = seen.lock().expect("nobody panics with it");
        (seen.samples, seen.judged)
    }
}

/// Calls `look` until the end. It hands on the place of a store, its LSN, whether it is ready, and its content.
fn looking(
    seen: &Arc<Mutex<Seen>>,
    mut look: impl FnMut(&mut dyn FnMut(usize, Lsn, bool, String)) + Send + 'static,
) -> JoinHandle<()> {
    let seen = seen.clone();
    let mut last: BTreeMap<usize, (Lsn, String)> = BTreeMap::new();
    thread::spawn(move || {
        while !seen.lock().expect("nobody panics with it").stop {
            look(&mut |store, lsn, ready, content| {
                let mut seen = seen.lock().expect("nobody panics with it");
                seen.samples += 1;
                seen.latest[store] = (lsn, ready);
                let differs = last.get(&store) != Some(&(lsn, content.clone()));
                if ready && differs {
                    last.insert(store, (lsn, content.clone()));
                    seen.judged += 1;
                    seen.ready.push(Sample { store, lsn, content });
                }
            });
            thread::sleep(Duration::from_millis(5));
        }
    })
}
