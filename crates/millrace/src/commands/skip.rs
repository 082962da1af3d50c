//! `millrace skip`: asks a store to leave records of the log out.

use change::Refusal;
use kafka::{Records, Skip};

use super::rebuild::resolve;
use super::stores::{configured, names};
use crate::failure::Outcome;
use crate::wiring::Process;

/// Records the request, of the newest log: that is where a store stops, or its copy.
pub(crate) fn execute(process: &Process, name: &str, records: Records, reason: String) -> Outcome {
    let all: Vec<String> = configured(process).into_iter().map(|(name, _)| name).collect();
    let stores = resolve(name, &all)?;
    let [store] = stores.as_slice() else {
        let remedy = format!("name one of these: {}", names(&stores));
        return Err(Refusal::new(format!("`{name}` means several stores"), remedy).into());
    };
    let kafka = process.kafka_briefly()?;
    let pipeline = process.config.pipeline.as_str();
    let generation = process.generations(&kafka)?.newest().number;
    let what = match &records {
        Records::At(offset) => format!("the record at offset {offset}"),
        Records::OfRow(key) => format!("each record of the row {key}"),
    };
    kafka::request_skip(&kafka, pipeline, &Skip { generation, store: store.clone(), records, reason })?;
    println!(
        "{store}: {what} of generation {generation} is left out if the store stops at it; millrace status shows it"
    );
    Ok(())
}
