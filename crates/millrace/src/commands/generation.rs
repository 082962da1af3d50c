//! `millrace generation`: a complete new log beside the current one, from which the stores are built, and which then takes
//! its place.
//!
//! `new` makes topics, slot and ledger, and announces the log in the last step, one Kafka transaction; a killed one is
//! continued by the next. What follows is done by whoever runs: the reader fills the log, the workers build from it and go
//! over, the reader makes it the current one.

use std::io::{IsTerminal, Write};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use change::{Refusal, TableProgress};
use kafka::{Connection, Generation, Generations, Names, ReadUntil};
use postgres::check;
use postgres::plan::Plan;
use postgres::setup::{self as source, SetupError};
use relay::{Ledger, Source, SourceError};
use serde::Serialize;
use tokio_postgres::Client;

use super::check::{Section, before_setup, of_problem};
use super::reader::source_of;
use super::setup::{Step, demand, make_log, make_publication, next_step};
use super::status::Reading;
use super::stores::Stores;
use crate::cli::Format;
use crate::failpoint;
use crate::failure::{Failure, Outcome};
use crate::wiring::Process;

/// Between two looks at how far it is.
const LOOK: Duration = Duration::from_secs(1);

#[derive(Serialize)]
struct Progress {
    generation: u32,
    log: String,
    /// Whether every store has gone over to it.
    current: bool,
    /// What is still to be done, for people.
    state: String,
}

/// Begins a new log, or goes on with the one that was begun unless there is to be one `again`; with `wait`, ends when it is
/// the current one.
pub(crate) fn new(process: &Process, again: bool, wait: bool, format: Format) -> Outcome {
    demand(before_setup(process)?.sections)?;
    let kafka = process.kafka()?;
    let pipeline = process.config.pipeline.as_str();
    let mut admin = process.connect(&process.admin()?)?;
    let known = process.generations(&kafka)?;
    process.runtime.block_on(source::exclude_others(&admin, &process.plan(known.current.number)?))?;
    // Nobody else changes them from here on, but for the reader that makes a filled log the current one.
    let known = process.generations(&kafka)?;
    let begun = match known.next.filter(|_| !again) {
        Some(next) if usable(process, &kafka, &admin, next)? => Some(next),
        _ => None,
    };
    let next = match begun {
        Some(next) => {
            tracing::info!(
                "generation {} was begun before and goes on; if it is refused by whoever runs: millrace generation new --again",
                next.number
            );
            next
        }
        None => {
            let number = known.newest().number + 1;
            // After a restore to before the setup there is none, and the source is asked for it.
            process.runtime.block_on(source::make_heartbeat(&mut admin, &process.plan(number)?))?;
            let next = Generation { number, diverged: diverged(process, &kafka, &known)? };
            make(process, &kafka, &mut admin, Generations { next: Some(next), ..known }, next)?;
            next
        }
    };
    drop(admin);
    let log = Names::new(pipeline, next.number)?.log();
    if !wait {
        let state = "the reader fills it and the workers build from it, as soon as they run".to_owned();
        tell(&Progress { generation: next.number, log, current: false, state }, format);
        if !format.json {
            println!("Readers keep the present stores meanwhile; millrace status shows how far it is.");
        }
        return Ok(());
    }
    let mut told = None;
    loop {
        let known = process.generations(&kafka)?;
        if known.next != Some(next) {
            if known.current != next {
                let what = format!("generation {} was given up for another", next.number);
                return Err(Refusal::new(what, "millrace status shows the logs that there are").into());
            }
            let state = "every store follows it".to_owned();
            tell(&Progress { generation: next.number, log, current: true, state }, format);
            return Ok(());
        }
        let state = state(process, &kafka, next)?;
        if told.as_ref() != Some(&state) {
            let log = log.clone();
            tell(&Progress { generation: next.number, log, current: false, state: state.clone() }, format);
            told = Some(state);
        }
        thread::sleep(LOOK);
    }
}

/// Makes topics, heartbeat, publication, slot and ledger of a log, and announces it.
fn make(
    process: &Process,
    kafka: &Connection,
    admin: &mut Client,
    announced: Generations,
    next: Generation,
) -> Result<(), Failure> {
    let plan = process.plan(next.number)?;
    let names = Names::new(&plan.pipeline, next.number)?;
    let problems = kafka::ensure_topics(kafka, &names, process.config.kafka.replication_factor)?;
    demand(vec![Section { about: "topics", findings: problems.into_iter().map(of_problem).collect() }])?;
    failpoint::reached("generation.topics");
    let ledger = kafka::read_ledger(kafka, &names, ReadUntil::Committed)?;
    let step = process.runtime.block_on(next_step(admin, &plan, &ledger))?;
    process.runtime.block_on(source::make_heartbeat(admin, &plan))?;
    process.runtime.block_on(make_publication(admin, &plan, &ledger))?;
    failpoint::reached("generation.source");
    if step == Step::MakeSlot {
        make_log(process, kafka, &names, &plan, admin, announced)?;
    }
    failpoint::reached("generation.announced");
    // Where the log was complete, and its announcement was overwritten.
    if process.generations(kafka)? != announced {
        kafka::write_generations(kafka, &plan.pipeline, &announced)?;
    }
    Ok(())
}

/// Whether a log that was begun can still be completed.
fn usable(process: &Process, kafka: &Connection, admin: &Client, next: Generation) -> Result<bool, Failure> {
    let slot = process.runtime.block_on(check::slot(admin, &process.plan(next.number)?.slot));
    let slot = slot.map_err(|error| SetupError::Failed { doing: "cannot read the slot".into(), error })?;
    let names = Names::new(process.config.pipeline.as_str(), next.number)?;
    if slot.is_none_or(|slot| slot.wrong.is_some())
        || !kafka::log_exists(kafka, &names)?
        || kafka::log_start(kafka, &names)? > 0
    {
        return Ok(false);
    }
    let Some(ledger) = ledger_of(kafka, &names)? else { return Ok(false) };
    let Some(progress) = &ledger.progress else { return Ok(false) };
    let mut source = source_of(process, next.number).map_err(unanswered)?;
    match source.state(&progress.timeline) {
        Ok(state) => Ok(relay::resume::check(&ledger, &state).is_ok()),
        Err(SourceError::Refused(_)) => Ok(false),
        Err(error) => Err(unanswered(error)),
    }
}

/// Whether the source lacks something that a log holds from which stores may have been built: it was restored to an earlier
/// point, or is another server. Where a log cannot be read nobody knows of any such thing.
fn diverged(process: &Process, kafka: &Connection, known: &Generations) -> Result<bool, Failure> {
    if known.next.is_some_and(|next| next.diverged) {
        // Some store may not have gone over to it.
        return Ok(true);
    }
    for log in [Some(known.current), known.next].into_iter().flatten() {
        let names = Names::new(process.config.pipeline.as_str(), log.number)?;
        let Some(progress) = ledger_of(kafka, &names)?.and_then(|ledger| ledger.progress) else { continue };
        let mut source = source_of(process, log.number).map_err(unanswered)?;
        let history = source.history(&progress.timeline).map_err(unanswered)?;
        if !relay::resume::same_history(&progress, &history) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A log's ledger; `None` where it cannot be read any more.
fn ledger_of(kafka: &Connection, names: &Names) -> Result<Option<Ledger>, Failure> {
    match kafka::read_ledger(kafka, names, ReadUntil::Committed) {
        Ok(ledger) => Ok(Some(ledger)),
        Err(kafka::KafkaError::Refused(refusal)) => {
            tracing::warn!("{}", refusal.what);
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

fn unanswered(error: impl std::fmt::Display) -> Failure {
    Failure::Failed(anyhow::anyhow!("cannot ask the source: {error}"))
}

/// What is still to be done for a log.
fn state(process: &Process, kafka: &Connection, next: Generation) -> Result<String, Failure> {
    let names = Names::new(process.config.pipeline.as_str(), next.number)?;
    let ledger = kafka::read_ledger(kafka, &names, ReadUntil::Committed)?;
    let Some(progress) = &ledger.progress else { return Ok("it has no first record yet".into()) };
    if progress.snapshot.is_some() {
        let tables = TableProgress::by_name(ledger.tables.values());
        let pending = tables.iter().filter(|table| table.pending());
        let tables: Vec<String> =
            pending.map(|table| format!("{} {}", table.name, Reading::of(table).describe())).collect();
        return Ok(if tables.is_empty() {
            "the stream catches up with what was read".into()
        } else {
            format!("being read: {}", tables.join("; "))
        });
    }
    let built: Vec<String> = Stores::new(process, &[])?
        .read()
        .iter()
        .map(|store| match &store.rebuild {
            Some(rebuild) => {
                format!(
                    "{}: offset {} of {}",
                    store.store,
                    rebuild.next_offset.unwrap_or(0),
                    progress.log_end
                )
            }
            None => format!("{}: {}", store.store, store.problem.as_deref().unwrap_or("no copy")),
        })
        .collect();
    Ok(format!("complete; stores are built from it: {}", built.join(", ")))
}

fn tell(progress: &Progress, format: Format) {
    if format.json {
        return super::print_line(progress);
    }
    let Progress { generation, log, current, state } = progress;
    let is = if *current { "is the current one: " } else { "" };
    println!("generation {generation}, topic {log}: {is}{state}");
}

/// Removes what is left of the logs before the current one.
pub(crate) fn retire(process: &Process, yes: bool) -> Outcome {
    let kafka = process.kafka_briefly()?;
    let pipeline = process.config.pipeline.as_str();
    let known = process.generations(&kafka)?;
    let mut earlier = Vec::new();
    // One that was begun and not announced is above the newest.
    for number in (1..=known.newest().number + 1).filter(|number| known.get(*number).is_none()) {
        let names = Names::new(pipeline, number)?;
        if kafka::log_exists(&kafka, &names)? {
            earlier.push((process.plan(number)?, names));
        }
    }
    if earlier.is_empty() {
        println!("there is no log but the current one, generation {}", known.current.number);
        return Ok(());
    }
    println!("these logs are not current, and will be removed for good:");
    for (plan, names) in &earlier {
        println!("  topics {}, {}; slot {}, if it is left", names.log(), names.ledger(), plan.slot);
        for (group, offset) in kafka::groups_of(&kafka, names)? {
            println!("    consumer group {group} stands there at offset {offset}");
        }
    }
    println!(
        "A consumer of your own must have gone over to {}.",
        Names::new(pipeline, known.current.number)?.log()
    );
    if !yes && !agreed()? {
        println!("nothing was removed");
        return Ok(());
    }
    let admin = process.connect(&process.admin()?)?;
    process.runtime.block_on(source::exclude_others(&admin, &process.plan(known.current.number)?))?;
    for (Plan { slot, .. }, names) in &earlier {
        process.runtime.block_on(source::drop_slot(&admin, slot))?;
        kafka::delete_topics(&kafka, names, false)?;
        println!("{} is removed", names.log());
    }
    Ok(())
}

/// Asks a person; a program has to say --yes.
fn agreed() -> Result<bool, Failure> {
    if !std::io::stdin().is_terminal() {
        let what = "nobody was asked whether to remove these logs";
        return Err(Refusal::new(what, "millrace generation retire --yes").into());
    }
    print!("Type yes to go on: ");
    std::io::stdout().flush().context("cannot ask")?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer).context("cannot ask")?;
    Ok(answer.trim() == "yes")
}
