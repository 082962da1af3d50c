//! A sink of your own: keeps a table of the source as rows of JSON in another Postgres, exactly once.
//!
//! ```text
//! cargo run --release --example mirror -- 127.0.0.1:9092 mailbox public.emails postgres://me@127.0.0.1/reports
//! ```
//!
//! `worker::run` decides what is applied and when; a sink only has to write the effect and the checkpoint in one
//! atomic step, and to refuse when the store is not where it was left: see [`Mirror::commit`]. Kill this program or
//! either server whenever you like.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, anyhow};
use change::{Clock, Op, Refusal, ReplicaIdentity, TableSchema};
use kafka::{Connection, GenerationsWatch, KafkaFeed, Names};
use tokio::runtime::Runtime;
use tokio_postgres::{Client, NoTls};
use worker::{Change, Checkpoint, Control, FeedError, Move, Sink, SinkError, StoreSpec, Stored, WorkerError};

const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS mirror (key text PRIMARY KEY, row jsonb NOT NULL);
    CREATE TABLE IF NOT EXISTS mirror_checkpoint (store text PRIMARY KEY, checkpoint jsonb NOT NULL)";
const LOAD: &str = "SELECT checkpoint::text FROM mirror_checkpoint WHERE store = $1";
const RESET: &str = "
    WITH gone AS (DELETE FROM mirror)
    INSERT INTO mirror_checkpoint VALUES ($1, $2::text::jsonb)
    ON CONFLICT (store) DO UPDATE SET checkpoint = excluded.checkpoint";
const MOVE: &str = "
    UPDATE mirror_checkpoint SET checkpoint = $3::text::jsonb WHERE store = $1 AND checkpoint = $2::text::jsonb";
const DELETE: &str = "DELETE FROM mirror WHERE key = ANY ($1)";
const UPSERT: &str = "
    INSERT INTO mirror SELECT key, row::jsonb FROM unnest($1::text[], $2::text[]) AS changed (key, row)
    ON CONFLICT (key) DO UPDATE SET row = excluded.row";

/// What is written here has this form; another number has the store filled anew.
const FORM: &str = "1";
/// Between two looks whether the log is still the current one.
const LOOK: Duration = Duration::from_secs(5);
/// Rows that are staged at most, but for one source transaction.
const STAGED_ROWS: usize = 10_000;

struct Mirror {
    runtime: Runtime,
    url: String,
    /// `None` before the first `load`, and while the server is away.
    client: Option<Client>,
    table: String,
    stores: [StoreSpec; 1],
    /// Whether all rows go before those staged come.
    emptied: bool,
    /// The last that was heard of each row: `None` when it is gone.
    staged: HashMap<String, Option<String>>,
}

impl Mirror {
    fn new(table: &str, url: &str) -> anyhow::Result<Self> {
        Ok(Mirror {
            runtime: Runtime::new()?,
            url: url.to_owned(),
            client: None,
            table: table.to_owned(),
            stores: [StoreSpec { name: format!("mirror.{table}"), definition: FORM.to_owned() }],
            emptied: false,
            staged: HashMap::new(),
        })
    }

    fn connect(&self) -> Result<Client, tokio_postgres::Error> {
        self.runtime.block_on(async {
            let (client, connection) = tokio_postgres::connect(&self.url, NoTls).await?;
            // It ends with the client, which sees its errors.
            tokio::spawn(connection);
            client.batch_execute(TABLES).await?;
            Ok(client)
        })
    }

    fn client(&mut self) -> Result<&mut Client, SinkError> {
        self.client.as_mut().ok_or_else(|| SinkError::Unavailable("the mirror is not connected".to_owned()))
    }
}

fn away(error: tokio_postgres::Error) -> SinkError {
    SinkError::Unavailable(format!("the mirror's Postgres: {error}"))
}

fn text(checkpoint: &Checkpoint) -> Result<String, SinkError> {
    serde_json::to_string(checkpoint).map_err(|error| SinkError::Poison(error.to_string()))
}

impl Sink for Mirror {
    fn stores(&self) -> &[StoreSpec] {
        &self.stores
    }

    fn wants(&self, _store: usize, schema: &TableSchema) -> bool {
        schema.full_name() == self.table
    }

    fn load(&mut self) -> Result<Vec<Stored>, SinkError> {
        let client = self.connect().map_err(away)?;
        let found = self.runtime.block_on(client.query_opt(LOAD, &[&self.stores[0].name])).map_err(away)?;
        self.client = Some(client);
        let stored = match found {
            None => Stored::Empty,
            Some(row) => match serde_json::from_str(row.get(0)) {
                Ok(checkpoint) => Stored::At(checkpoint),
                Err(error) => Stored::Damaged(format!("its checkpoint cannot be read: {error}")),
            },
        };
        Ok(vec![stored])
    }

    fn reset(&mut self, _store: usize, to: &Checkpoint) -> Result<(), SinkError> {
        let (name, to) = (self.stores[0].name.clone(), text(to)?);
        let handle = self.runtime.handle().clone();
        let client = self.client()?;
        handle.block_on(client.execute(RESET, &[&name, &to])).map_err(away)?;
        Ok(())
    }

    fn apply(&mut self, _store: usize, change: &Change<'_>) -> Result<(), SinkError> {
        let keyed = change.schema.key_columns().next().is_some();
        if change.schema.identity != ReplicaIdentity::Full || !keyed {
            let table = &self.table;
            let what = format!("{table} has no primary key, or its changes do not tell whole rows");
            let remedy = format!(
                "ALTER TABLE {} REPLICA IDENTITY FULL, and add a primary key",
                change.schema.quoted()
            );
            return Err(Refusal::new(what, remedy).into());
        }
        if change.event.after.is_some() {
            let columns = change.schema.columns.iter().map(|column| column.recorded_name());
            change.demand(&self.stores[0].name, columns)?;
        }
        let key = String::from_utf8_lossy(change.key).into_owned();
        let row = change.event.after.map(str::to_owned);
        match change.event.op {
            Op::Create | Op::Read | Op::Update | Op::Delete => drop(self.staged.insert(key, row)),
            Op::Truncate => {
                self.staged.clear();
                self.emptied = true;
            }
            Op::Message => {}
        }
        Ok(())
    }

    fn due_in(&mut self, _now_us: i64) -> Duration {
        Duration::ZERO
    }

    fn full(&self) -> bool {
        self.staged.len() >= STAGED_ROWS
    }

    /// One transaction: the checkpoint moves, if it is where it was left, and the rows change.
    fn commit(&mut self, moves: &[Option<Move>]) -> Result<(), SinkError> {
        let Some(Move { from, to }) = &moves[0] else { return Ok(()) };
        let (name, from, to) = (self.stores[0].name.clone(), text(from)?, text(to)?);
        let emptied = std::mem::take(&mut self.emptied);
        let (mut gone, mut keys, mut rows) = (Vec::new(), Vec::new(), Vec::new());
        for (key, row) in self.staged.drain() {
            match row {
                None => gone.push(key),
                Some(row) => {
                    keys.push(key);
                    rows.push(row);
                }
            }
        }
        let handle = self.runtime.handle().clone();
        let client = self.client()?;
        let moved = handle.block_on(async {
            let transaction = client.transaction().await?;
            if transaction.execute(MOVE, &[&name, &from, &to]).await? == 0 {
                return Ok(false);
            }
            if emptied {
                transaction.execute("DELETE FROM mirror", &[]).await?;
            }
            transaction.execute(DELETE, &[&gone]).await?;
            transaction.execute(UPSERT, &[&keys, &rows]).await?;
            transaction.commit().await?;
            Ok(true)
        });
        match moved {
            Ok(true) => Ok(()),
            Ok(false) => Err(SinkError::Moved("the mirror is not where this worker left it".to_owned())),
            // Also when the answer to COMMIT was lost: the checkpoint tells, when it is read again.
            Err(error) => Err(away(error)),
        }
    }

    fn discard(&mut self) {
        self.staged.clear();
        self.emptied = false;
    }

    fn check(&mut self) -> Result<(), SinkError> {
        Ok(())
    }
}

struct System;

impl Clock for System {
    fn now_us(&self) -> i64 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        i64::try_from(now.as_micros()).unwrap_or(i64::MAX)
    }

    fn sleep(&self, duration: Duration) {
        thread::sleep(duration);
    }
}

/// Runs until it is killed, for an orderly end would gain nothing; but a log that is not current any more is left for the
/// one that is, from which the mirror is then filled anew.
struct WhileCurrent {
    generations: RefCell<GenerationsWatch>,
    generation: u32,
    looked: Cell<Instant>,
}

impl Control for WhileCurrent {
    fn stop(&self) -> bool {
        if self.looked.get().elapsed() < LOOK {
            return false;
        }
        self.looked.set(Instant::now());
        self.generations.borrow_mut().look().is_ok_and(|known| known.current.number != self.generation)
    }

    fn delayed(&self, reason: &str) {
        eprintln!("{reason}");
    }
}

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [bootstrap, pipeline, table, url] = arguments.as_slice() else {
        return Err(anyhow!("usage: mirror BOOTSTRAP PIPELINE SCHEMA.TABLE TARGET_URL"));
    };
    // Under a name of its own it has its place in the group back at once after a kill; so only one may run.
    let kafka = Connection::new(bootstrap, BTreeMap::new())?.with_host("mirror");
    let mut mirror = Mirror::new(table, url)?;
    loop {
        let outcome = (|| {
            let mut generations = GenerationsWatch::new(&kafka, pipeline).map_err(FeedError::from)?;
            let generation = generations.look().map_err(FeedError::from)?.current.number;
            let names = Names::new(pipeline, generation)?;
            let mut feed = KafkaFeed::open(&kafka, &names, &names.group("mirror", None))?;
            let generations = RefCell::new(generations);
            let control = WhileCurrent { generations, generation, looked: Cell::new(Instant::now()) };
            worker::run(&mut feed, &mut mirror, &System, &control)
        })();
        match outcome {
            Err(WorkerError::Feed(error @ (FeedError::Unavailable(_) | FeedError::Fenced))) => {
                eprintln!("{error}; trying again");
                thread::sleep(Duration::from_secs(1));
            }
            Err(error) => return Err(error).context("the mirror has stopped"),
            Ok(()) => eprintln!("another log is the current one"),
        }
    }
}
