//! `millrace verify`: the place where the proof of crate `verify` meets the configuration.

mod report;
mod stores;

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::anyhow;
use change::{Refusal, TableSchema};
use kafka::{Names, ReadUntil};
use postgres::setup::SetupError;
use redis_counters::sql::{Aggregate, Definition};
use tantivy_search::IndexDefinition;
use tokio_postgres::Client;
use verify::{Counter, Index, Measure, NotVerified, Source, Verified, Verifier};

use self::report::Report;
use self::stores::{HttpIndex, KafkaLog, RedisCounter};
use super::stores::Stores;
use crate::cli::Format;
use crate::failure::{Failure, Outcome};
use crate::wiring::Process;

/// What is to be compared: its name and what is known of it, or why it cannot be compared.
enum Store {
    Counter(String, Result<Counter, NotVerified>),
    Index(String, SocketAddr, Result<Index, NotVerified>),
}

impl Store {
    fn name(&self) -> String {
        match self {
            Store::Counter(name, _) => format!("counters.{name}"),
            Store::Index(name, ..) => format!("search.{name}"),
        }
    }
}

/// Compares the named stores, or all of them, with Postgres.
pub(crate) fn execute(
    process: &Process,
    wanted: &[String],
    timeout: Duration,
    all: bool,
    format: Format,
) -> Outcome {
    // Refuses names that are not configured.
    let found = Stores::new(process, wanted)?.read();
    let kafka = process.kafka()?;
    let logs = process.generations(&kafka)?;
    let client = process.connect(&process.source()?)?;
    let stores = stores_of(process, &client, wanted)?;
    let source =
        Source::new(process.runtime.handle().clone(), client).map_err(|e| Failure::Failed(anyhow!(e)))?;
    let mut report = Report::new(format, all);
    for store in stores {
        // One that has gone over to the next log has its place there.
        let found = found.iter().find(|found| found.store == store.name());
        let follows = found.and_then(|found| logs.get(found.generation?)).unwrap_or(logs.current);
        let names = Names::new(process.config.pipeline.as_str(), follows.number)?;
        let id = kafka::read_ledger(&kafka, &names, ReadUntil::Committed)?
            .log
            .ok_or_else(|| Refusal::new("the log is empty: the setup has not finished", "millrace setup"))?;
        let mut log = KafkaLog { id, kafka: &kafka, names: &names };
        let (name, result) =
            one(process, store, &mut Verifier::new(&source, &mut log, &mut report, timeout))?;
        report.store(&name, result);
    }
    report.finish()
}

fn one(
    process: &Process,
    store: Store,
    verifier: &mut Verifier<'_>,
) -> Result<(String, Result<Verified, NotVerified>), Failure> {
    Ok(match store {
        Store::Counter(name, counter) => {
            let mut redis = RedisCounter { counters: process.counters()?, name: name.clone() };
            (format!("counters.{name}"), counter.and_then(|counter| verifier.counter(&counter, &mut redis)))
        }
        Store::Index(name, address, index) => {
            let mut http = HttpIndex::new(address, &name);
            (format!("search.{name}"), index.and_then(|index| verifier.index(&index, &mut http)))
        }
    })
}

fn stores_of(process: &Process, client: &Client, wanted: &[String]) -> Result<Vec<Store>, Failure> {
    let is_wanted = |store: &String| wanted.is_empty() || wanted.contains(store);
    let mut stores = Vec::new();
    for counter in &process.config.counters {
        let store = format!("counters.{}", counter.name);
        if is_wanted(&store) {
            let table = table(process, client, counter.definition.table())?;
            let known = table.and_then(|table| counter_of(&store, &counter.definition, table));
            stores.push(Store::Counter(counter.name.clone(), known));
        }
    }
    let Some(search) = &process.config.search else { return Ok(stores) };
    let address = super::stores::reachable(search.listen);
    for index in &search.indexes {
        let store = format!("search.{}", index.name);
        if is_wanted(&store) {
            let table = table(process, client, (&index.schema, &index.table))?;
            let known = table.and_then(|table| index_of(&store, index, table));
            stores.push(Store::Index(index.name.clone(), address, known));
        }
    }
    Ok(stores)
}

/// The table as it is now.
fn table(
    process: &Process,
    client: &Client,
    (schema, table): (&str, &str),
) -> Result<Result<TableSchema, NotVerified>, Failure> {
    let name = change::table_name(schema, table);
    let doing = || format!("cannot look at table {name}");
    let found = process.runtime.block_on(postgres::catalog::table_schema(client, schema, table));
    let found = found.map_err(|error| SetupError::Failed { doing: doing(), error })?;
    Ok(found.ok_or_else(|| NotVerified::new(format!("table {name} does not exist"), "millrace check")))
}

fn counter_of(store: &str, definition: &Definition, table: TableSchema) -> Result<Counter, NotVerified> {
    let bound = definition.bind_new_rows(&table).map_err(not_verified)?;
    Ok(Counter {
        store: store.to_owned(),
        definition: bound.stamp(),
        table,
        columns: definition.referenced_columns().into_iter().map(str::to_owned).collect(),
        groups: definition.group_columns().len(),
        measure: match definition.aggregate() {
            Aggregate::CountRows => Measure::Rows,
            Aggregate::Count { .. } => Measure::Values,
            Aggregate::Sum { .. } => Measure::Sum,
        },
        query: Box::new(move |from| bound.select_sql(from)),
    })
}

fn index_of(store: &str, definition: &IndexDefinition, table: TableSchema) -> Result<Index, NotVerified> {
    definition.bind(&table).map_err(not_verified)?;
    let columns = definition.columns().into_iter().map(str::to_owned).collect();
    Ok(Index { store: store.to_owned(), definition: definition.hash(), table, columns })
}

fn not_verified(refusal: Refusal) -> NotVerified {
    NotVerified::new(refusal.what, refusal.remedy)
}
