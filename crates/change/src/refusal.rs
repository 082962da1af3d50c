use std::fmt;

/// Something that Millrace will not do because it could be wrong: what is the matter, and what mends it.
/// The process ends with exit code 3 and changes nothing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// What is the matter, with names: `slot "millrace_mailbox_1" was invalidated (wal_removed)`.
    pub what: String,
    /// What to do: a command or a statement to run, as text that can be pasted.
    pub remedy: String,
}

/// The remedy where a log cannot be complete any more.
pub const NEW_LOG: &str = "begin a new log: millrace generation new, and let the reader and the workers run; the stores are built \
                           from it, and readers keep the present ones until then";

impl Refusal {
    /// Puts the two together.
    pub fn new(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Refusal { what: what.into(), remedy: remedy.into() }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n  remedy: {}", self.what, self.remedy)
    }
}

impl std::error::Error for Refusal {}
