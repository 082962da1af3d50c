//! Names that the configuration gives: which are possible, and what Postgres objects they become.

use std::fmt;

/// Longest name of a counter.
const MAX_COUNTER_NAME: usize = 64;

/// A pipeline's name: `[a-z][a-z0-9_]{0,31}`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Pipeline(String);

impl Pipeline {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut bytes = text.bytes();
        let first = bytes.next().is_some_and(|b| b.is_ascii_lowercase());
        let rest = bytes.all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
        (first && rest && text.len() <= 32).then(|| Pipeline(text.to_owned()))
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// The slot of a generation: `millrace_mailbox_1`.
    pub(crate) fn slot(&self, generation: u32) -> String {
        format!("millrace_{}_{generation}", self.0)
    }

    /// The generation of which this is the slot.
    pub(crate) fn generation_of(&self, slot: &str) -> Option<u32> {
        slot.strip_prefix("millrace_")?.strip_prefix(&self.0)?.strip_prefix('_')?.parse().ok()
    }

    /// The key of a generation's row in the heartbeat table: `mailbox`, then `mailbox.2` and so on.
    pub(crate) fn heartbeat(&self, generation: u32) -> String {
        if generation == 1 { self.0.clone() } else { format!("{}.{generation}", self.0) }
    }

    /// The publication: `millrace_mailbox`.
    pub(crate) fn publication(&self) -> String {
        format!("millrace_{}", self.0)
    }
}

impl fmt::Display for Pipeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether a counter can be called this: it becomes a Redis key, with `:` before what is hidden.
pub(crate) fn is_counter_name(text: &str) -> bool {
    let mut bytes = text.bytes();
    bytes.next().is_some_and(|b| b.is_ascii_lowercase())
        && bytes.all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'_' | b'-'))
        && text.len() <= MAX_COUNTER_NAME
}
