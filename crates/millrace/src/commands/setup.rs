//! `millrace setup`: makes what a pipeline needs, in an order in which every interruption can be continued.
//!
//! | step | after it, a killed setup |
//! | --- | --- |
//! | topics | makes what is missing |
//! | heartbeat table, publication (under the lock of h22) | finds them and adds what is missing |
//! | ledger: slot is being created; log: record 0 | sees that a slot of that name, if any, is half-made: drops it |
//! | slot, with an exported snapshot | the same |
//! | ledger: slot created, first progress; generation | is done, and only adds tables |
//!
//! The last step is one Kafka transaction. Whatever else is found (a slot that the ledger knows nothing of, or a
//! ledger whose slot is gone) is refused (h06). The log's writer is opened only while the ledger is incomplete,
//! since opening it fences a reader, and a reader runs only on a complete one.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::{Duration, Instant};

use change::{
    Clock, LedgerEntry, NEW_LOG, Position, Progress, Read, Refusal, SlotIntent, SlotState, SnapshotProgress,
    TableProgress,
};
use kafka::{
    Connection, Generation, Generations, Names, RangeReader, ReadUntil, SetupRecord, SetupWriter, Start,
};
use postgres::ReplicationConnection;
use postgres::check::{self, Finding, Verdict};
use postgres::plan::{Plan, Table};
use postgres::setup::{self as source, NewSlot, SetupError};
use relay::{Ledger, PublishedTable};
use tokio_postgres::Client;
use worker::LogBatch;

use super::check::{Section, before_setup, of_problem};
use crate::failpoint;
use crate::failure::{Failure, Outcome};
use crate::stop::{Stop, SystemClock};
use crate::wiring::{FIRST_GENERATION, Process};

/// How long record 0 may take to come back.
const HEADER_WAIT: Duration = Duration::from_secs(10);
/// Between two looks for it.
const HEADER_LOOK: Duration = Duration::from_millis(20);

/// Makes everything, or prints what would be made.
pub(crate) fn execute(process: &Process, dry_run: bool) -> Outcome {
    if dry_run {
        return print_script(process);
    }
    demand(before_setup(process)?.sections)?;
    let kafka = process.kafka()?;
    let known = match kafka::generations(&kafka, process.config.pipeline.as_str())? {
        Some(known) => known,
        // Or the topic that says which log is current was lost.
        None => Generations::of(Generation::new(newest_slot(process)?)),
    };
    let generation = known.current.number;
    let plan = process.plan(generation)?;
    let names = Names::new(&plan.pipeline, generation)?;
    let problems = kafka::ensure_topics(&kafka, &names, process.config.kafka.replication_factor)?;
    demand(vec![Section { about: "topics", findings: problems.into_iter().map(of_problem).collect() }])?;

    let mut admin = process.connect(&process.admin()?)?;
    process.runtime.block_on(source::exclude_others(&admin, &plan))?;
    // What is committed tells enough: a setup that was killed in its Kafka transaction must not hold this one up,
    // and a reader's open transaction hides nothing that stood before it.
    let ledger = kafka::read_ledger(&kafka, &names, ReadUntil::Committed)?;
    let step = process.runtime.block_on(next_step(&admin, &plan, &ledger))?;
    process.runtime.block_on(source::make_heartbeat(&mut admin, &plan))?;
    let added = process.runtime.block_on(make_publication(&mut admin, &plan, &ledger))?;
    match step {
        Step::Complete => {
            if kafka::generations(&kafka, &plan.pipeline)?.is_none() {
                kafka::write_generations(&kafka, &plan.pipeline, &known)?;
            }
            println!("pipeline {} is set up", plan.pipeline);
            if !added.is_empty() {
                let names: Vec<String> = added.iter().map(ToString::to_string).collect();
                println!("published, and to be read by the reader: {}", names.join(", "));
            }
        }
        Step::MakeSlot => match make_log(process, &kafka, &names, &plan, &mut admin, known)? {
            Some(NewSlot { consistent_point, .. }) => {
                println!("pipeline {} is set up: slot {} at {consistent_point}", plan.pipeline, plan.slot);
            }
            None => println!("pipeline {} is set up", plan.pipeline),
        },
    }
    Ok(())
}

/// The generation of the newest slot that the pipeline has; the first where there is none.
fn newest_slot(process: &Process) -> Result<u32, Failure> {
    let client = process.connect(&process.source()?)?;
    let slots = process.runtime.block_on(source::slots(&client))?;
    let number = |slot: &String| process.config.pipeline.generation_of(slot);
    Ok(slots.iter().filter_map(number).max().unwrap_or(FIRST_GENERATION))
}

/// Refuses on everything that is wrong, and logs what is only worth knowing.
pub(crate) fn demand(sections: Vec<Section>) -> Outcome {
    let mut wrong = Vec::new();
    for Finding { what, verdict, remedy } in sections.into_iter().flat_map(|section| section.findings) {
        match verdict {
            Verdict::Good => tracing::debug!(what),
            Verdict::Advice => tracing::warn!("{what}; remedy: {remedy}"),
            Verdict::Wrong => wrong.push(Refusal::new(what, remedy)),
        }
    }
    if wrong.is_empty() { Ok(()) } else { Err(wrong.into()) }
}

/// What a DBA would do; neither Kafka nor any right at the source is needed for it.
fn print_script(process: &Process) -> Outcome {
    let plan = &process.plan(FIRST_GENERATION)?;
    let names = Names::new(&plan.pipeline, FIRST_GENERATION)?;
    let admin = process.connect(&process.admin()?)?;
    let publication = process
        .runtime
        .block_on(check::publication(&admin, plan))
        .map_err(|error| SetupError::Failed { doing: "cannot read the publication".into(), error })?;
    let missing = publication.as_ref().map_or(plan.tables.clone(), |publication| publication.missing.clone());
    print!("{}", source::script(plan, &missing, publication.is_some()));
    println!("-- Kafka: one partition each");
    println!("-- topic {}  (cleanup.policy=delete, retention.ms=-1, retention.bytes=-1)", names.log());
    println!("-- topic {}  (cleanup.policy=compact)", names.ledger());
    println!("-- topic {}  (cleanup.policy=compact)", names.generations());
    Ok(())
}

/// What is left to do about slot and ledger.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Step {
    /// Nothing.
    Complete,
    /// Everything, after dropping a half-made slot.
    MakeSlot,
}

pub(crate) async fn next_step(admin: &Client, plan: &Plan, ledger: &Ledger) -> Result<Step, Failure> {
    let slot = check::slot(admin, &plan.slot).await;
    let slot = slot.map_err(|error| SetupError::Failed { doing: "cannot read the slot".into(), error })?;
    let step = decide(ledger, slot.is_some(), &plan.slot)?;
    if step == Step::Complete
        && let Some(Finding { what, remedy, .. }) = slot.as_ref().and_then(|slot| slot.wrong.clone())
    {
        return Err(Refusal::new(what, remedy).into());
    }
    Ok(step)
}

/// Continues what is half-made by us, and refuses what is not.
fn decide(ledger: &Ledger, slot_exists: bool, slot: &str) -> Result<Step, Refusal> {
    let state = ledger.slot.as_ref().map(|intent| &intent.state);
    match (&ledger.progress, state, slot_exists) {
        (Some(_), Some(SlotState::Created { .. }), true) => Ok(Step::Complete),
        (Some(_), _, false) => Err(Refusal::new(
            format!(
                "the log exists but slot {slot} is gone: changes since then cannot be in the log any more"
            ),
            NEW_LOG,
        )),
        (None, Some(SlotState::Creating), _) | (None, None, false) => Ok(Step::MakeSlot),
        (None, None, true) => Err(Refusal::new(
            format!(
                "slot {slot} exists but the ledger knows nothing of it: is it another pipeline's, or are the topics lost?"
            ),
            format!(
                "if nobody needs it: SELECT pg_drop_replication_slot('{slot}'); then run `millrace setup`"
            ),
        )),
        (Some(_), None | Some(SlotState::Creating), true) | (None, Some(SlotState::Created { .. }), _) => {
            Err(Refusal::new(
                "the ledger contradicts itself about the slot: somebody else wrote to it, or it lost records",
                "millrace teardown --yes && millrace setup",
            ))
        }
    }
}

/// Makes the publication, or brings its tables in line with the configuration, and gives the tables that are new in it.
/// Refuses one that is wrong in any other way, and a table whose name another one has in the log.
pub(crate) async fn make_publication(
    admin: &mut Client,
    plan: &Plan,
    ledger: &Ledger,
) -> Result<Vec<Table>, Failure> {
    let found = check::publication(admin, plan).await;
    let found =
        found.map_err(|error| SetupError::Failed { doing: "cannot read the publication".into(), error })?;
    let (missing, surplus, exists) = match found {
        None => (plan.tables.clone(), Vec::new(), false),
        Some(publication) if publication.findings.is_empty() => {
            (publication.missing, publication.surplus, true)
        }
        Some(publication) => {
            let refusal = |finding: Finding| Refusal::new(finding.what, finding.remedy);
            return Err(publication.findings.into_iter().map(refusal).collect::<Vec<_>>().into());
        }
    };
    let large = check::too_large(admin, plan, &missing).await;
    let large =
        large.map_err(|error| SetupError::Failed { doing: "cannot look at the tables".into(), error })?;
    demand(vec![Section { about: "tables", findings: large }])?;
    for table in &missing {
        let oid = table.oid(admin).await;
        let oid = oid.map_err(|error| SetupError::Failed { doing: format!("cannot find {table}"), error })?;
        refuse_stranger(ledger, table, oid)?;
    }
    if !missing.is_empty() {
        source::publish(admin, plan, &missing, exists).await?;
    }
    if !surplus.is_empty() {
        source::withdraw(admin, plan, &surplus).await?;
        println!("taken out of the publication: {}", surplus.join(", "));
    }
    Ok(missing)
}

/// Refuses a table that the log knows, unless it is the same one, which the reader then reads again.
fn refuse_stranger(ledger: &Ledger, table: &Table, oid: Option<u32>) -> Result<(), Refusal> {
    let schemas = ledger.schemas.iter().filter(|(_, schema)| Table::of(schema) == *table);
    if !schemas.map(|(_, schema)| schema.family()).all(|family| Some(family) == oid) {
        let what = format!("the log holds rows of an earlier table {table}, which is not published any more");
        return Err(Refusal::new(what, NEW_LOG));
    }
    Ok(())
}

/// The log's first record, the slot, and the ledger's first progress, `announced` with it; `None` when they are there
/// after all.
pub(crate) fn make_log(
    process: &Process,
    kafka: &Connection,
    names: &Names,
    plan: &Plan,
    admin: &mut Client,
    announced: Generations,
) -> Result<Option<NewSlot>, Failure> {
    let (mut writer, ledger) = SetupWriter::open(kafka, names)?;
    if ledger.progress.is_some() {
        // The last Kafka transaction of a setup that was killed took effect after all.
        return Ok(None);
    }
    let fresh = ledger.slot.is_none();
    let log = ledger.log.clone().unwrap_or_else(new_log_id);
    let intent =
        |state| SetupRecord::Ledger(LedgerEntry::Slot(SlotIntent { slot: plan.slot.clone(), state }));
    let mut records = vec![intent(SlotState::Creating)];
    if ledger.log.is_none() {
        records.push(SetupRecord::LogHeader(log.clone()));
    }
    if fresh || ledger.log.is_none() {
        writer.write(&records)?;
    }
    process.runtime.block_on(source::drop_slot(admin, &plan.slot))?;
    let log_end = after_header(kafka, names)?;
    let beat = process.runtime.block_on(source::read_heartbeat(admin, plan))?;
    let slot = process.runtime.block_on(async {
        let mut replication =
            ReplicationConnection::connect(&process.source()?).await.map_err(SetupError::from)?;
        Ok::<_, Failure>(source::create_slot(&mut replication, admin, plan).await?)
    })?;
    failpoint::reached("setup.slot");
    let (published, xmin) = match process.runtime.block_on(source::published(admin, plan)) {
        Ok(published) => published,
        Err(error) => {
            // A slot that nobody knows of keeps WAL for nobody.
            process.runtime.block_on(source::drop_slot(admin, &plan.slot))?;
            return Err(error.into());
        }
    };
    let progress = Progress {
        log,
        generation: names.generation(),
        end_lsn: slot.consistent_point,
        position: Position::START,
        split: None,
        log_end,
        timeline: slot.timeline.clone(),
        beat,
        snapshot: Some(Box::new(SnapshotProgress {
            genesis: Some(slot.snapshot.clone()),
            ..SnapshotProgress::default()
        })),
        time_ms: SystemClock(Stop::default()).now_us().div_euclid(1000),
    };
    let created =
        SlotState::Created { consistent_point: slot.consistent_point, snapshot: slot.snapshot.clone() };
    let mut records = vec![intent(created)];
    for PublishedTable { relation, name, root, publication, estimated_rows, description, .. } in published {
        let unread = TableProgress {
            root,
            estimated_rows,
            description: Some(Box::new(description)),
            publication_xmin: xmin,
            ..TableProgress::new(name, publication, Read::Nothing)
        };
        records.push(SetupRecord::Ledger(LedgerEntry::Table(relation, unread)));
    }
    records.push(SetupRecord::Ledger(LedgerEntry::Progress(progress)));
    records.push(SetupRecord::Generations(announced));
    writer.write(&records)?;
    Ok(Some(slot))
}

/// The offset after record 0. It is not always 1: an aborted attempt leaves a gap.
fn after_header(kafka: &Connection, names: &Names) -> Result<i64, Failure> {
    let begun = Instant::now();
    let mut batch = LogBatch::default();
    // A Kafka transaction has committed a moment before its records can be read.
    while begun.elapsed() < HEADER_WAIT {
        let mut reader = RangeReader::open(kafka, names, Start::Beginning, None)?;
        while reader.read(HEADER_WAIT, &mut batch)? {
            if let Some(header) = (0..batch.len()).map(|place| batch.get(place)).find(|record| record.log) {
                return Ok(header.offset + 1);
            }
        }
        std::thread::sleep(HEADER_LOOK);
    }
    let what = format!("topic {} does not give back the record that was just written", names.log());
    Err(Failure::Failed(anyhow::anyhow!(what)))
}

/// 128 random bits.
fn new_log_id() -> String {
    // The standard library seeds every RandomState from the system's random numbers.
    let random = || RandomState::new().build_hasher().finish();
    format!("{:016x}{:016x}", random(), random())
}

#[cfg(test)]
mod tests {
    use change::{Lsn, Timeline};

    use super::*;

    #[test]
    fn h06_half_made_setups_are_continued_and_foreign_ones_refused() {
        let progress = Progress {
            log: "id".into(),
            generation: 1,
            end_lsn: Lsn(1),
            position: Position::START,
            split: None,
            log_end: 1,
            timeline: Timeline { system_id: "1".into(), timeline: 1 },
            beat: (0, String::new()),
            snapshot: None,
            time_ms: 0,
        };
        let created = SlotState::Created { consistent_point: Lsn(1), snapshot: "1:1:".parse().unwrap() };
        let decided = |progress: Option<&Progress>, state: Option<SlotState>, exists| {
            let slot = state.map(|state| SlotIntent { slot: "s".into(), state });
            decide(&Ledger { progress: progress.cloned(), slot, ..Ledger::default() }, exists, "s").ok()
        };
        let creating = || Some(SlotState::Creating);
        assert_eq!(decided(None, None, false), Some(Step::MakeSlot));
        assert_eq!(decided(None, None, true), None, "not ours by the ledger");
        assert_eq!(decided(None, creating(), false), Some(Step::MakeSlot));
        assert_eq!(decided(None, creating(), true), Some(Step::MakeSlot), "half-made by us");
        assert_eq!(decided(Some(&progress), Some(created.clone()), true), Some(Step::Complete));
        assert_eq!(decided(Some(&progress), Some(created.clone()), false), None, "the slot is lost");
        assert_eq!(decided(Some(&progress), creating(), true), None);
        assert_eq!(decided(None, Some(created), true), None);
    }
}
