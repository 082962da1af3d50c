//! `millrace teardown`: removes what the pipeline made, and nothing else.
//!
//! The slot goes first: dropping it fails while a reader runs, before anything is lost. What was removed before a
//! kill stays removed, and the next run removes the rest.

use std::io::{IsTerminal, Write};

use anyhow::Context;
use change::Refusal;
use kafka::Names;
use postgres::plan::Plan;
use postgres::setup as source;

use crate::failure::{Failure, Outcome};
use crate::wiring::{FIRST_GENERATION, Process};

/// Lists, asks, removes.
pub(crate) fn execute(process: &Process, yes: bool) -> Outcome {
    let kafka = process.kafka_briefly()?;
    let pipeline = process.config.pipeline.as_str();
    let known = kafka::generations(&kafka, pipeline)?;
    let newest = known.map_or(FIRST_GENERATION, |known| known.newest().number);
    // One that was begun and not announced is above the newest.
    let mut logs = (1..=newest).map(|number| Names::new(pipeline, number)).collect::<Result<Vec<_>, _>>()?;
    let begun = Names::new(pipeline, newest + 1)?;
    if known.is_some() && kafka::log_exists(&kafka, &begun)? {
        logs.push(begun);
    }
    let plans: Vec<Plan> =
        logs.iter().map(|names| process.plan(names.generation())).collect::<Result<_, _>>()?;
    let (names, plan) = (Names::new(pipeline, newest)?, process.plan(newest)?);
    let groups = ["counters", "search"].map(|worker| names.group(worker, None));
    let mut counters = process.config.redis.as_ref().map(|_| process.counters()).transpose()?;
    let owned = counters.as_mut().map(|counters| counters.owned()).transpose()?.unwrap_or_default();
    let directories: Vec<_> = process
        .config
        .search
        .iter()
        .flat_map(|search| search.indexes.iter().map(|index| (&search.directory, &index.name)))
        .flat_map(|(directory, index)| tantivy_search::directories_of(directory, index))
        .collect();

    println!("pipeline {}: this will be removed for good", plan.pipeline);
    println!("  Postgres: publication {}, the heartbeat", plan.publication);
    println!("  Kafka:    topic {}", names.generations());
    for (plan, names) in plans.iter().zip(&logs) {
        println!("  log:      slot {}, topics {}, {}", plan.slot, names.log(), names.ledger());
    }
    println!("            groups {}", groups.join(", "));
    for counter in &owned {
        println!("  Redis:    counter {counter}");
    }
    for directory in &directories {
        println!("  disk:     {}", directory.display());
    }
    println!("The tables themselves are not touched.");
    if !yes && !agreed(&plan.pipeline)? {
        println!("nothing was removed");
        return Ok(());
    }

    let mut admin = process.connect(&process.admin()?)?;
    process.runtime.block_on(source::exclude_others(&admin, &plan))?;
    // Refused while a worker runs, which would otherwise fill its stores anew; so before anything is lost.
    kafka::delete_groups(&kafka, &groups)?;
    for plan in &plans {
        process.runtime.block_on(source::drop_slot(&admin, &plan.slot))?;
    }
    for names in &logs {
        kafka::delete_topics(&kafka, names, names.generation() == newest)?;
    }
    if let Some(counters) = &mut counters {
        counters.drop_counters(&owned.iter().map(String::as_str).collect::<Vec<_>>())?;
    }
    for directory in &directories {
        std::fs::remove_dir_all(directory)
            .with_context(|| format!("cannot remove {}", directory.display()))?;
    }
    process.runtime.block_on(source::remove(&mut admin, &plan))?;
    println!("pipeline {} is removed", plan.pipeline);
    Ok(())
}

/// Asks a person; a program has to say --yes.
fn agreed(pipeline: &str) -> Result<bool, Failure> {
    if !std::io::stdin().is_terminal() {
        let what = format!("nobody was asked whether to remove pipeline {pipeline}");
        return Err(Refusal::new(what, "millrace teardown --yes").into());
    }
    print!("Type the pipeline's name to go on: ");
    std::io::stdout().flush().context("cannot ask")?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer).context("cannot ask")?;
    Ok(answer.trim() == pipeline)
}
