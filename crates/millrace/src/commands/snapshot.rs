//! `millrace snapshot TABLE`: how far a table's rows are in the log; brings a table of the configuration in that is not
//! published yet, after saying what that means.

use change::{Read, Refusal, TableProgress};
use kafka::{Names, ReadUntil};
use postgres::check;
use postgres::plan::{Plan, Table};
use postgres::setup::{self as source, SetupError};
use relay::PublishedTable;

use super::check::Section;
use super::setup::{demand, make_publication};
use super::status::{Reading, bytes};
use crate::failure::{Failure, Outcome};
use crate::wiring::Process;

/// Tells about the table, and with `yes` publishes it; the running reader then reads it.
pub(crate) fn execute(process: &Process, table: &str, yes: bool) -> Outcome {
    let kafka = process.kafka()?;
    let names: Names = process.names(&kafka)?;
    let plan = process.plan(names.generation())?;
    let named: Option<Table> = table.parse().ok();
    let Some(wanted) = plan.tables.iter().find(|known| Some(*known) == named.as_ref()) else {
        let known: Vec<String> = plan.tables.iter().map(Table::to_string).collect();
        let what = format!("table {table} is not in `postgres.tables`, which names {}", known.join(", "));
        return Err(Refusal::new(what, "add it there as schema.table, and run this again").into());
    };
    let mut admin = process.connect(&process.admin()?)?;
    let (published, _) = process.runtime.block_on(source::published(&admin, &plan))?;
    let ledger = kafka::read_ledger(&kafka, &names, ReadUntil::Committed)?;
    let oid = process.runtime.block_on(wanted.oid(&admin)).map_err(failed)?;
    let family = |found: &PublishedTable| found.root.unwrap_or(found.relation);
    if let Some(oid) = oid.filter(|oid| published.iter().any(|found| family(found) == *oid)) {
        let known = ledger.tables.iter().filter(|(relation, table)| table.family(**relation) == oid);
        let known = TableProgress::by_name(known.map(|(_, table)| table));
        println!("{}", progress(table, known.first()));
        return Ok(());
    }
    process.runtime.block_on(async {
        let size = check::size(&admin, wanted).await.map_err(failed)?;
        println!("{table} is not in the log yet: about {} rows, {}", size.rows, bytes(size.bytes));
        println!("It would be locked against writers while it enters the publication (2 s at most, else tried again),");
        println!("then the reader reads its rows in rounds of short snapshots while every table's changes flow on.");
        println!("No store is held up by it; those that derive from it are ready when it has been read.");
        for finding in check::too_large(&admin, &plan, std::slice::from_ref(wanted)).await.map_err(failed)? {
            println!("{}\n  remedy: {}", finding.what, finding.remedy);
        }
        Ok::<_, Failure>(())
    })?;
    if !yes {
        println!("Nothing was changed; `millrace snapshot {} --yes` does it.", shell_word(table));
        return Ok(());
    }
    // It is the running role's rights that count.
    let reader = process.connect(&process.source()?)?;
    let alone = Plan { tables: vec![wanted.clone()], ..plan.clone() };
    let findings = process.runtime.block_on(check::tables(&reader, &alone)).map_err(failed)?;
    demand(vec![Section { about: "postgres", findings }])?;
    process.runtime.block_on(source::exclude_others(&admin, &plan))?;
    // Whatever else the configuration has or lacks is for `millrace setup`.
    let mut tables = process.runtime.block_on(source::members(&admin, &plan))?;
    tables.push(wanted.clone());
    let plan = Plan { tables, ..plan };
    process.runtime.block_on(make_publication(&mut admin, &plan, &ledger))?;
    println!("{table} is published; `millrace status` shows how far the reader has read it.");
    Ok(())
}

fn progress(table: &str, known: Option<&TableProgress>) -> String {
    match known {
        None => format!("{table} is published; the reader has not taken note of it yet"),
        Some(progress) if progress.pending() => {
            format!("{table} is being read: {}", Reading::of(progress).describe())
        }
        Some(TableProgress { read: Read::Removed, .. }) => {
            format!("{table} was published again; the reader has not taken note of it yet")
        }
        Some(progress) => format!(
            "{table} is in the log: {} rows were read, and every change since. To build a store anew from the log: \
             millrace rebuild",
            progress.rows
        ),
    }
}

/// A word for a shell.
fn shell_word(text: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || matches!(c, '.' | '_' | '-');
    if text.chars().all(plain) { text.to_owned() } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

fn failed(error: tokio_postgres::Error) -> SetupError {
    SetupError::Failed { doing: "cannot look at the table".into(), error }
}
