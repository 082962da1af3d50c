//! What a commit says of itself: the checkpoint, in Tantivy's payload, in the same file as the list of segments.

use change::Refusal;
use serde::{Deserialize, Serialize};
use worker::Checkpoint;

/// The format written by this version.
const FORMAT: u32 = 1;

/// The content of a commit's payload.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Payload {
    pub(crate) checkpoint: Checkpoint,
    /// The key's columns, in the order in which ids are made of them; empty while nothing was indexed.
    pub(crate) key: Vec<String>,
    /// Configured columns that the table was seen to have: one that goes missing was dropped or renamed.
    pub(crate) seen: Vec<String>,
}

/// Why a payload cannot be used.
#[derive(Debug)]
pub(crate) enum PayloadError {
    /// It is not one, or damaged.
    Unreadable(String),
    /// A newer version wrote it.
    Newer(u32),
}

#[derive(Serialize, Deserialize)]
struct Json<C, N> {
    format: u32,
    #[serde(flatten)]
    checkpoint: C,
    key: N,
    seen: N,
}

impl Payload {
    /// Of an index that holds nothing.
    pub(crate) fn empty(checkpoint: &Checkpoint) -> Payload {
        Payload { checkpoint: checkpoint.clone(), key: Vec::new(), seen: Vec::new() }
    }

    pub(crate) fn to_json(&self) -> String {
        let Payload { checkpoint, key, seen } = self;
        let json = Json { format: FORMAT, checkpoint, key, seen };
        // Strings, numbers and lists of them always become JSON.
        serde_json::to_string(&json).unwrap_or_default()
    }

    pub(crate) fn from_json(text: &str) -> Result<Payload, PayloadError> {
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        let unreadable = |error: serde_json::Error| PayloadError::Unreadable(error.to_string());
        let Format { format } = serde_json::from_str(text).map_err(unreadable)?;
        if format > FORMAT {
            return Err(PayloadError::Newer(format));
        }
        let json: Json<Checkpoint, Vec<String>> = serde_json::from_str(text).map_err(unreadable)?;
        let Json { checkpoint, key, seen, .. } = json;
        Ok(Payload { checkpoint, key, seen })
    }
}

/// The refusal that follows from [`PayloadError::Newer`].
pub(crate) fn newer(index: &str, format: u32) -> Refusal {
    Refusal::new(
        format!(
            "the search index `{index}` was written in format {format}; this Millrace reads up to {FORMAT}"
        ),
        format!("run the newer Millrace, or delete the directory of `{index}` to have it filled again"),
    )
}

#[cfg(test)]
mod tests {
    use change::Lsn;

    use super::*;

    #[test]
    fn survives_the_way_through_json_and_knows_a_newer_one() {
        let checkpoint = Checkpoint {
            log: "a log".into(),
            generation: 3,
            next_offset: 42,
            lsn: Lsn(77),
            definition: "d".into(),
            ready: true,
            skipped: vec![7],
        };
        let payload = Payload { checkpoint, key: vec!["id".into()], seen: vec!["body".into()] };
        assert_eq!(Payload::from_json(&payload.to_json()).unwrap(), payload);
        assert!(matches!(Payload::from_json(r#"{"format":2,"else":1}"#), Err(PayloadError::Newer(2))));
        assert!(matches!(Payload::from_json(r#"{"format":1}"#), Err(PayloadError::Unreadable(_))));
        assert!(matches!(Payload::from_json(""), Err(PayloadError::Unreadable(_))));
    }
}
