//! Counters as other programs of ours look at them: `verify`, `status`, `wait`, `teardown`.

use change::Refusal;
use worker::{Checkpoint, SinkError};

use crate::connection::Server;
use crate::keys::{CounterKeys, Namespace};
use crate::observation::{checkpoint, exists};
use crate::shape::{Aggregate, Shape};
use crate::store::{Counter, Store};

/// A part of a counter's content.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Part {
    /// What the part is of; `None` if there is no (readable) checkpoint.
    pub checkpoint: Option<Checkpoint>,
    /// Groups and their values.
    pub groups: Vec<(String, String)>,
    /// Where the next part begins; `None` after the last.
    pub next: Option<String>,
}

/// The cursor before the first part and after the last.
const END: &str = "0";

/// Reads the counters of a pipeline; writes nothing but for [`rebuild`](Self::rebuild) and
/// [`drop_counters`](Self::drop_counters).
pub struct Counters {
    store: Store,
}

impl Counters {
    /// Connects with the first question.
    pub fn new(server: &Server, space: Namespace) -> Result<Self, Refusal> {
        Ok(Counters { store: Store::new(server, space)? })
    }

    /// Where each counter stands; `None` for one that has no (readable) checkpoint.
    pub fn checkpoints(&mut self, names: &[&str]) -> Result<Vec<Option<Checkpoint>>, SinkError> {
        let counters = self.counters(names);
        let all = self.store.observe(&counters.iter().collect::<Vec<_>>(), false)?;
        let mut found = Vec::with_capacity(all.len());
        for (seen, name) in all.iter().zip(names) {
            found.push(checkpoint(&seen.text, name)?.map(|held| held.checkpoint));
        }
        Ok(found)
    }

    /// Where each counter's copy stands: the outer `None` where none is asked for, the inner where it has not begun.
    pub fn copies(&mut self, names: &[&str]) -> Result<Vec<Option<Option<Checkpoint>>>, SinkError> {
        let copies = self.copies_of(names);
        let all = self.store.observe(&copies.iter().collect::<Vec<_>>(), false)?;
        let mut found = Vec::with_capacity(all.len());
        for (seen, name) in all.iter().zip(names) {
            let at = checkpoint(&seen.text, name)?.map(|held| held.checkpoint);
            found.push(exists(&seen.text).then_some(at));
        }
        Ok(found)
    }

    /// Asks the worker, running or not, to build a counter anew beside what it shows; `false` if that was asked for
    /// already and goes on.
    pub fn rebuild(&mut self, name: &str) -> Result<bool, SinkError> {
        let copy = self.copies_of(&[name]).remove(0);
        self.store.request(&copy)
    }

    /// A part of a counter's content, from the beginning or from where the last part ended. Every group that is there
    /// all the time is in one of the parts, some in several; of a group that comes or goes meanwhile nothing is said.
    /// Without GROUP BY the one group is "". Empty for a value that is missing or of another type.
    pub fn part(&mut self, name: &str, from: Option<&str>) -> Result<Part, SinkError> {
        let counter = self.counters(&[name]).remove(0);
        let (seen, cursor, content) = self.store.scan(&counter, from.unwrap_or(END))?;
        let mut content = content.into_iter();
        let mut groups = Vec::with_capacity(content.len() / 2);
        while let (Some(group), Some(value)) = (content.next(), content.next()) {
            groups.push((group, value));
        }
        let checkpoint = checkpoint(&seen, name)?.map(|held| held.checkpoint);
        Ok(Part { checkpoint, groups, next: (cursor != END).then_some(cursor) })
    }

    /// The contents of some groups and the counter's checkpoint, read at one moment. So many groups at most as may hold
    /// Redis for the time that their reading takes: a thousand are no burden.
    pub fn groups(
        &mut self,
        name: &str,
        groups: &[String],
    ) -> Result<(Option<Checkpoint>, Vec<Option<String>>), SinkError> {
        let counter = self.counters(&[name]).remove(0);
        let (seen, values) = self.store.values(&counter, groups)?;
        Ok((checkpoint(&seen, name)?.map(|held| held.checkpoint), values))
    }

    /// The counters that this pipeline owns in this Redis, configured or not.
    pub fn owned(&mut self) -> Result<Vec<String>, SinkError> {
        let owners = self.store.owners()?.into_iter();
        let pipeline = self.store.space.pipeline();
        let mut names: Vec<String> =
            owners.filter(|(_, owner)| owner == pipeline).map(|(name, _)| name).collect();
        names.sort();
        Ok(names)
    }

    /// Removes counters with all that belongs to them; those of another pipeline and other programs' keys stay.
    /// Gives the number of counters that were there.
    pub fn drop_counters(&mut self, names: &[&str]) -> Result<u64, SinkError> {
        let (counters, copies) = (self.counters(names), self.copies_of(names));
        let all: Vec<&Counter> = counters.iter().zip(&copies).flat_map(|(one, copy)| [one, copy]).collect();
        self.store.drop(&all)
    }

    fn counters(&self, names: &[&str]) -> Vec<Counter> {
        names.iter().map(|name| counter(name, self.store.space.counter(name))).collect()
    }

    fn copies_of(&self, names: &[&str]) -> Vec<Counter> {
        names.iter().map(|name| counter(name, self.store.space.copy(name))).collect()
    }
}

fn counter(name: &str, keys: CounterKeys) -> Counter {
    // Only writing needs to know the shape.
    let shape = Shape { aggregate: Aggregate::Rows, grouped: true };
    Counter { name: name.to_owned(), keys, shape, shown: true }
}
