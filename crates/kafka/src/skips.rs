//! Requests to leave a record of the log out of a store, in the pipeline's generations topic.
//!
//! One record each, under the key `skip/GENERATION/STORE/OFFSET`, or `skip/GENERATION/STORE/key/KEY` for all of one row. It
//! stays there: a store that is filled again finds it again. Which records a store was really built without, its checkpoint
//! says.
//!
//! ```json
//! {"format":1, "reason":"written by a broken script, see the incident of Monday"}
//! ```

use change::Refusal;
use rdkafka::message::{BorrowedMessage, Message};
use serde::{Deserialize, Serialize};

use crate::generations::{not_set_up, state, write};
use crate::publisher::add_now;
use crate::{Connection, KafkaError, Names};

/// Stands before a row's key.
const OF_ROW: &str = "key/";
/// The format that this version writes, and the newest that it reads.
const FORMAT: u32 = 1;
/// Requests that are kept in memory; a pipeline that needs more needs a new log.
const MOST: usize = 10_000;

/// Which records are meant.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Records {
    /// The one at this offset.
    At(i64),
    /// Those of the row with this key, values joined as in a document's id.
    OfRow(String),
}

/// Records of a log that a store is to leave out where it cannot take them in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Skip {
    /// The log's generation.
    pub generation: u32,
    /// The store: `counters.unread`.
    pub store: String,
    /// Which of them.
    pub records: Records,
    /// Why, in the operator's words.
    pub reason: String,
}

#[derive(Serialize, Deserialize)]
struct Value {
    format: u32,
    reason: String,
}

/// Leaves the request for the workers, who look for it every second.
pub fn request_skip(connection: &Connection, pipeline: &str, skip: &Skip) -> Result<(), KafkaError> {
    let (_, skips) = state(connection, pipeline)?.ok_or_else(|| not_set_up(pipeline))?;
    if skips.len() >= MOST {
        let what = format!("there are {MOST} requests to leave a record out");
        return Err(Refusal::new(what, change::NEW_LOG).into());
    }
    let topic = Names::new(pipeline, skip.generation)?.generations();
    let records = match &skip.records {
        Records::At(offset) => offset.to_string(),
        Records::OfRow(key) => format!("{OF_ROW}{key}"),
    };
    let key = format!("skip/{}/{}/{records}", skip.generation, skip.store);
    let value = Value { format: FORMAT, reason: skip.reason.clone() };
    let value = serde_json::to_vec(&value).expect("a plain structure becomes JSON");
    // An id of its own, so that a reader that writes its generation at this moment is not fenced.
    write(connection, &format!("{topic}.skip"), &topic, |batch| {
        add_now(batch, Some(key.as_bytes()), Some(&value));
        Ok(())
    })
}

/// The request in this record, if this version understands it. A request that is not understood leaves the store stopped,
/// which is safe.
pub(crate) fn decode(message: &BorrowedMessage<'_>) -> Option<Skip> {
    let key = std::str::from_utf8(message.key()?).ok()?;
    let (generation, rest) = key.strip_prefix("skip/")?.split_once('/')?;
    let (store, records) = rest.split_once('/')?;
    let records = match records.strip_prefix(OF_ROW) {
        Some(key) => Records::OfRow(key.to_owned()),
        None => Records::At(records.parse().ok()?),
    };
    let value: Value = serde_json::from_slice(message.payload()?).ok()?;
    (value.format <= FORMAT).then_some(Skip {
        generation: generation.parse().ok()?,
        store: store.to_owned(),
        records,
        reason: value.reason,
    })
}

/// Takes in a request. A second one for the same records takes the first one's place.
pub(crate) fn take_in(skips: &mut Vec<Skip>, skip: Skip) {
    let same = |known: &Skip| {
        (known.generation, &known.store, &known.records) == (skip.generation, &skip.store, &skip.records)
    };
    match skips.iter().position(same) {
        Some(place) => skips[place] = skip,
        None if skips.len() < MOST => skips.push(skip),
        None => {}
    }
}
