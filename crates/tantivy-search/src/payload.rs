//! What a commit says of itself: the checkpoint, in Tantivy's payload, in the same file as the list of segments.

use change::Refusal;
use serde::{Deserialize, Serialize};
use worker::Checkpoint;

use crate::IndexDefinition;

/// The format written by this version.
const FORMAT: u32 = 1;

/// The content of a commit's payload.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Payload {
    #[serde(flatten)]
    pub(crate) checkpoint: Checkpoint,
    /// The key's columns, in the order in which ids are made of them; empty while nothing was indexed.
    pub(crate) key: Vec<String>,
    /// Configured columns that the table was seen to have: one that goes missing was dropped or renamed.
    pub(crate) seen: Vec<String>,
    /// Whether the index holds what it held when it was ready last: it has stopped, or waits for its copy.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) kept: bool,
    /// What `checkpoint.definition` is the hash of, so that the index can be shown when another is configured;
    /// absent where an older version wrote the commit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) index: Option<IndexDefinition>,
}

/// Why a payload cannot be used.
#[derive(Debug)]
pub(crate) enum PayloadError {
    /// It is not one, or damaged.
    Unreadable(String),
    /// A newer version wrote it.
    Newer(u32),
}

impl Payload {
    /// Of an index that holds nothing.
    pub(crate) fn empty(checkpoint: &Checkpoint, index: Option<IndexDefinition>) -> Payload {
        Payload { checkpoint: checkpoint.clone(), key: Vec::new(), seen: Vec::new(), kept: false, index }
    }

    /// Whether searches are answered from it.
    pub(crate) fn is_whole(&self) -> bool {
        self.checkpoint.ready || self.kept
    }

    pub(crate) fn to_json(&self) -> String {
        #[derive(Serialize)]
        struct Written<'a> {
            format: u32,
            #[serde(flatten)]
            payload: &'a Payload,
        }
        // Strings, numbers and lists of them always become JSON.
        serde_json::to_string(&Written { format: FORMAT, payload: self }).unwrap_or_default()
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
        serde_json::from_str(text).map_err(unreadable)
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
            last: "41 0/4D:t:5 00000000deadbeef".parse().ok(),
            stopped: Some(worker::Stopped::new(42, "it is not JSON")),
        };
        let (key, seen) = (vec!["id".into()], vec!["body".into()]);
        let payload = Payload { checkpoint, key, seen, kept: true, index: Some(IndexDefinition::default()) };
        assert_eq!(Payload::from_json(&payload.to_json()).unwrap(), payload);
        assert!(matches!(Payload::from_json(r#"{"format":2,"else":1}"#), Err(PayloadError::Newer(2))));
        assert!(matches!(Payload::from_json(r#"{"format":1}"#), Err(PayloadError::Unreadable(_))));
        assert!(matches!(Payload::from_json(""), Err(PayloadError::Unreadable(_))));
    }

    #[test]
    fn a_payload_of_an_older_version_names_no_last_record() {
        let old = r#"{"format":1,"log":"a log","generation":3,"next_offset":42,"lsn":"0/4D","definition":"d",
            "ready":true,"skipped":[],"key":["id"],"seen":["body"]}"#;
        let payload = Payload::from_json(old).unwrap();
        assert_eq!((payload.checkpoint.next_offset, payload.checkpoint.last), (42, None));
        assert!(!payload.to_json().contains("last"), "an older version reads what it wrote");
        // And what a newer one wrote: it passes over what it does not know.
        #[derive(Deserialize)]
        struct Older {
            next_offset: i64,
        }
        let last = "41 0/4D:t:5 00000000deadbeef".parse().ok();
        let newer = Payload { checkpoint: Checkpoint { last, ..payload.checkpoint.clone() }, ..payload };
        let Older { next_offset } = serde_json::from_str(&newer.to_json()).unwrap();
        assert_eq!(next_offset, 42);
    }
}
