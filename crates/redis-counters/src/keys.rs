//! Where things stand in Redis. Applications read the value and the checkpoint's `lsn`; the rest is ours.
//!
//! | key | holds |
//! | --- | --- |
//! | `PREFIX COUNTER` | the value: a hash with a field per group, or a string without GROUP BY |
//! | `PREFIX millrace:PIPELINE:COUNTER` | the checkpoint: a hash |
//! | `…:rows`, `…:nonnull` | hidden counts: hashes with the value's fields |
//! | `…:staging`, `…:staging:value`, `…:staging:rows`, `…:staging:nonnull` | a large commit under way |
//! | `…:copy` and `…:copy:value`, `…:copy:rows` and so on | the copy that is to take the counter's place, in the same form |
//! | `PREFIX millrace:owners` | hash: which pipeline owns a counter's name |
//!
//! The owners' hash tells a counter that lost its checkpoint (ours: filled again) from another program's key or
//! another pipeline's counter of the same name (never touched).
//!
//! A copy's checkpoint is there as soon as one is asked for, with nothing in it but `state`; to delete it is to call
//! the rebuild off.

use std::collections::HashMap;

use change::Refusal;

/// The part of a Redis database that a pipeline's counters live in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Namespace {
    prefix: String,
    pipeline: String,
}

/// The keys of one counter.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct CounterKeys {
    pub(crate) owners: String,
    pub(crate) checkpoint: String,
    pub(crate) value: String,
    pub(crate) rows: String,
    pub(crate) nonnull: String,
    /// Holds the token of who stages.
    pub(crate) staging: String,
    pub(crate) staging_value: String,
    pub(crate) staging_rows: String,
    pub(crate) staging_nonnull: String,
}

impl Namespace {
    /// Keys of `pipeline`, each beginning with `prefix`, which may be empty.
    pub fn new(prefix: impl Into<String>, pipeline: impl Into<String>) -> Self {
        Namespace { prefix: prefix.into(), pipeline: pipeline.into() }
    }

    /// The pipeline.
    pub fn pipeline(&self) -> &str {
        &self.pipeline
    }

    /// The key that applications read a counter from.
    pub fn value_key(&self, counter: &str) -> String {
        format!("{}{counter}", self.prefix)
    }

    /// The key of a counter's checkpoint, whose field `lsn` applications may read.
    pub fn checkpoint_key(&self, counter: &str) -> String {
        format!("{}millrace:{}:{counter}", self.prefix, self.pipeline)
    }

    pub(crate) fn owners_key(&self) -> String {
        format!("{}millrace:owners", self.prefix)
    }

    pub(crate) fn counter(&self, counter: &str) -> CounterKeys {
        self.keys(self.value_key(counter), self.checkpoint_key(counter))
    }

    /// Where the copy is built that is to take the counter's place.
    pub(crate) fn copy(&self, counter: &str) -> CounterKeys {
        let checkpoint = format!("{}:copy", self.checkpoint_key(counter));
        self.keys(format!("{checkpoint}:value"), checkpoint)
    }

    fn keys(&self, value: String, checkpoint: String) -> CounterKeys {
        let hidden = |name: &str| format!("{checkpoint}:{name}");
        CounterKeys {
            owners: self.owners_key(),
            value,
            rows: hidden("rows"),
            nonnull: hidden("nonnull"),
            staging: hidden("staging"),
            staging_value: hidden("staging:value"),
            staging_rows: hidden("staging:rows"),
            staging_nonnull: hidden("staging:nonnull"),
            checkpoint,
        }
    }

    /// Refuses counters whose keys would collide.
    pub(crate) fn distinct<'a>(&self, counters: impl Iterator<Item = &'a str>) -> Result<(), Refusal> {
        let mut taken = HashMap::from([(self.owners_key(), "millrace itself")]);
        for counter in counters {
            let (keys, copy) = (self.counter(counter), self.copy(counter));
            for key in keys.in_order()[1..].iter().chain(&copy.in_order()[1..]) {
                if let Some(other) = taken.insert((*key).to_owned(), counter) {
                    let what = format!("counter `{counter}` needs the Redis key `{key}`, as does `{other}`");
                    return Err(Refusal::new(what, "give one of the counters another name"));
                }
            }
        }
        Ok(())
    }
}

impl CounterKeys {
    /// As the scripts number them.
    pub(crate) fn in_order(&self) -> [&str; 9] {
        [
            &self.owners,
            &self.checkpoint,
            &self.value,
            &self.rows,
            &self.nonnull,
            &self.staging,
            &self.staging_value,
            &self.staging_rows,
            &self.staging_nonnull,
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_contracts_names() {
        let space = Namespace::new("", "mailbox");
        assert_eq!(space.value_key("unread"), "unread");
        assert_eq!(space.checkpoint_key("unread"), "millrace:mailbox:unread");
        let keys = Namespace::new("app:", "mailbox").counter("unread");
        assert!(keys.in_order().iter().all(|key| key.starts_with("app:")), "{keys:?}");
    }

    #[test]
    fn colliding_counters_are_refused() {
        let space = Namespace::new("", "p");
        assert!(space.distinct(["a", "b", "a:b"].into_iter()).is_ok());
        for pair in
            [["a", "a"], ["a", "a:rows"], ["a", "a:copy"], ["a", "millrace:p:a"], ["a", "millrace:owners"]]
        {
            assert!(space.distinct(pair.into_iter()).is_err(), "{pair:?}");
        }
    }
}
