//! Requests to leave a record of the log out of a store, in the pipeline's generations topic.
//!
//! One record each, under the key `skip/GENERATION/STORE/OFFSET`. It stays there: a store that is filled again finds it
//! again. Which records a store was really built without, its checkpoint says.
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

/// The format that this version writes, and the newest that it reads.
const FORMAT: u32 = 1;
/// Requests that are kept in memory; a pipeline that needs more needs a new log.
const MOST: usize = 10_000;

/// A record of a log that a store is to leave out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Skip {
    /// The log's generation.
    pub generation: u32,
    /// The store: `counters.unread`.
    pub store: String,
    /// The record's offset.
    pub offset: i64,
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
    let key = format!("skip/{}/{}/{}", skip.generation, skip.store, skip.offset);
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
    let (store, offset) = rest.rsplit_once('/')?;
    let value: Value = serde_json::from_slice(message.payload()?).ok()?;
    (value.format <= FORMAT).then_some(Skip {
        generation: generation.parse().ok()?,
        store: store.to_owned(),
        offset: offset.parse().ok()?,
        reason: value.reason,
    })
}

/// Takes in a request. A second one for the same record takes the first one's place.
pub(crate) fn take_in(skips: &mut Vec<Skip>, skip: Skip) {
    let same = |known: &Skip| {
        (known.generation, &known.store, known.offset) == (skip.generation, &skip.store, skip.offset)
    };
    match skips.iter().position(same) {
        Some(place) => skips[place] = skip,
        None if skips.len() < MOST => skips.push(skip),
        None => {}
    }
}
