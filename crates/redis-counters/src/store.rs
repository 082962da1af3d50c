//! The scripts, called: everything that is said to Redis about counters, each call one atomic step.

use std::time::Instant;

use redis::{FromRedisValue, Script, ScriptInvocation};
use worker::SinkError;

use crate::connection::{Link, Server, missing_permission};
use crate::keys::{CounterKeys, Namespace};
use crate::observation::Held;
use crate::pace::Pace;
use crate::shape::Shape;

/// A counter as Redis has to do with it.
#[derive(Clone, Debug)]
pub(crate) struct Counter {
    pub(crate) name: String,
    pub(crate) keys: CounterKeys,
    pub(crate) shape: Shape,
    /// Whether readers see it; else it is the copy of one.
    pub(crate) shown: bool,
}

/// What `load.lua` says of a counter.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Seen {
    /// See [`observation`](crate::observation).
    pub(crate) text: String,
    /// Whether a large commit was left unfinished.
    pub(crate) leftover: bool,
}

/// One column of groups as Redis has them: `None` for a missing field.
pub(crate) type Column = Vec<Option<Vec<u8>>>;

/// What `read.lua` gives for a counter: values, rows, nonnull.
pub(crate) type Columns = Vec<Column>;

/// The pipeline's part of a Redis.
pub(crate) struct Store {
    link: Link,
    pub(crate) space: Namespace,
    /// Of scripts that read or write fields.
    pub(crate) writing: Pace,
    /// Of scripts that copy fields.
    pub(crate) copying: Pace,
    load: Script,
    read: Script,
    commit: Script,
    stage: Script,
    tear: Script,
    reset: Script,
    rebuild: Script,
    swap: Script,
    drop: Script,
    part: Script,
}

macro_rules! script {
    ($file:literal) => {
        Script::new(concat!(include_str!("scripts/counter.lua"), include_str!(concat!("scripts/", $file))))
    };
}

/// A script's verdict: 0 for done, a counter's place when it is not as expected, below 0 when it may not be written.
pub(crate) type Verdict = (i64, String);

impl Store {
    pub(crate) fn new(server: &Server, space: Namespace) -> Result<Self, change::Refusal> {
        Ok(Store {
            link: Link::new(server)?,
            space,
            writing: Pace::of_writes(server.longest_script),
            copying: Pace::of_copies(server.longest_script),
            load: script!("load.lua"),
            read: script!("read.lua"),
            commit: script!("commit.lua"),
            stage: script!("stage.lua"),
            tear: script!("tear.lua"),
            reset: script!("reset.lua"),
            rebuild: script!("rebuild.lua"),
            swap: script!("swap.lua"),
            drop: script!("drop.lua"),
            part: script!("part.lua"),
        })
    }

    /// Observes counters, all at one moment. With `writes`, also that the user may write them.
    pub(crate) fn observe(&mut self, counters: &[&Counter], writes: bool) -> Result<Vec<Seen>, SinkError> {
        let mut call = prepared(&self.load, counters.iter().copied());
        call.arg(if writes { "write" } else { "look" });
        for counter in counters {
            call.arg(&counter.name);
        }
        let found: Vec<(String, u64, String)> = self.link.run(&call)?;
        let mut all = Vec::with_capacity(found.len());
        for (text, left, denied) in found {
            if !denied.is_empty() {
                return Err(missing_permission(&denied));
            }
            all.push(Seen { text, leftover: left > 0 });
        }
        Ok(all)
    }

    /// Enters the pipeline as the owner of a counter that nobody owns.
    pub(crate) fn claim(&mut self, counter: &Counter) -> Result<(), SinkError> {
        let mut command = redis::cmd("HSETNX");
        command.arg(&counter.keys.owners).arg(&counter.name).arg(self.space.pipeline());
        self.link.with(|connection| command.exec(connection))
    }

    /// Removes what an unfinished large commit left.
    pub(crate) fn clear_staging(&mut self, counter: &Counter) -> Result<(), SinkError> {
        let mut command = redis::cmd("UNLINK");
        command.arg(&counter.keys.in_order()[5..]);
        self.link.with(|connection| command.exec(connection))
    }

    /// Empties a counter that was seen as `seen`, and makes it `to`.
    pub(crate) fn reset(&mut self, counter: &Counter, seen: &str, to: &Held) -> Result<(), SinkError> {
        let mut call = prepared(&self.reset, [counter]);
        call.arg(&counter.name).arg(seen).arg(self.space.pipeline());
        if counter.shape.grouped {
            call.arg(0).arg(0);
        } else {
            call.arg(1).arg(counter.shape.initial());
            match counter.shape.hides_nonnull() {
                true => call.arg(2).arg("").arg(0),
                false => call.arg(0),
            };
        }
        checkpoint_fields(&mut call, to);
        let verdict = self.link.run(&call)?;
        judge(verdict, &[counter])
    }

    /// Reads groups of counters, all at one moment and only if each counter is as expected.
    pub(crate) fn read(&mut self, wanted: &[Wanted<'_>]) -> Result<Vec<Columns>, SinkError> {
        let counters: Vec<&Counter> = wanted.iter().map(|wanted| wanted.counter).collect();
        let mut call = prepared(&self.read, counters.iter().copied());
        call.arg(wanted.len());
        for wanted in wanted {
            call.arg(&wanted.counter.name).arg(wanted.expected);
        }
        let mut fields = 0;
        for wanted in wanted {
            let kind = match wanted.from {
                Place::Live if wanted.counter.shape.grouped => "h",
                Place::Live => "s",
                Place::Staged => "b",
            };
            call.arg(wanted.token).arg(kind).arg(wanted.groups.len());
            for group in wanted.groups {
                call.arg(group);
            }
            fields += wanted.groups.len() * wanted.counter.shape.hashes();
        }
        let (place, seen, columns): (i64, String, Vec<Columns>) =
            timed(&mut self.link, &mut self.writing, &call, fields)?;
        judge((place, seen), &counters)?;
        if columns.len() != wanted.len() || columns.iter().any(|columns| columns.len() != 3) {
            return Err(SinkError::Unavailable("Redis: a script's answer has an unknown form".to_owned()));
        }
        Ok(columns)
    }

    /// Builds a part of a new value beside the live one: `arguments`, which write so many fields, as `stage.lua` has them.
    pub(crate) fn stage(
        &mut self,
        counter: &Counter,
        fields: usize,
        arguments: impl FnOnce(&mut ScriptInvocation<'_>),
    ) -> Result<(), SinkError> {
        piece(&mut self.link, &self.stage, &mut self.writing, counter, fields, arguments).map(drop)
    }

    /// Copies a piece of a counter's hash to the staging keys; gives the cursor of the next one, `0` after the last.
    pub(crate) fn stage_copy(
        &mut self,
        counter: &Counter,
        fields: usize,
        arguments: impl FnOnce(&mut ScriptInvocation<'_>),
    ) -> Result<String, SinkError> {
        piece(&mut self.link, &self.stage, &mut self.copying, counter, fields, arguments)
    }

    /// Changes a part of a counter in place: `arguments`, which touch so many fields, as `tear.lua` has them. Gives its
    /// answer: the next cursor where there is one.
    pub(crate) fn tear(
        &mut self,
        counter: &Counter,
        fields: usize,
        arguments: impl FnOnce(&mut ScriptInvocation<'_>),
    ) -> Result<String, SinkError> {
        piece(&mut self.link, &self.tear, &mut self.writing, counter, fields, arguments)
    }

    /// Moves counters: `arguments`, which write so many fields, as `commit.lua` has them.
    pub(crate) fn commit(
        &mut self,
        counters: &[&Counter],
        fields: usize,
        arguments: impl FnOnce(&mut ScriptInvocation<'_>),
    ) -> Result<(), SinkError> {
        let mut call = prepared(&self.commit, counters.iter().copied());
        arguments(&mut call);
        let verdict = timed(&mut self.link, &mut self.writing, &call, fields)?;
        judge(verdict, counters)
    }

    /// Asks for the copy of a counter that was seen as `seen`; with `keep`, what it shows stays.
    pub(crate) fn rebuild(
        &mut self,
        counter: &Counter,
        copy: &Counter,
        seen: &str,
        keep: bool,
    ) -> Result<(), SinkError> {
        let mut call = prepared(&self.rebuild, [counter, copy]);
        call.arg(&counter.name).arg(seen).arg(self.space.pipeline());
        call.arg(if keep { "keep" } else { "remove" });
        let verdict = self.link.run(&call)?;
        judge(verdict, &[counter, copy])
    }

    /// Asks for the copy of a counter, whatever it holds; whether there was none.
    pub(crate) fn request(&mut self, copy: &Counter) -> Result<bool, SinkError> {
        let mut command = redis::cmd("HSETNX");
        command.arg(&copy.keys.checkpoint).arg("state").arg("requested");
        self.link.with(|connection| command.query(connection))
    }

    /// Puts a copy that was seen as `seen` in the counter's place; `false` if the counter stands further on.
    pub(crate) fn swap(&mut self, counter: &Counter, copy: &Counter, seen: &str) -> Result<bool, SinkError> {
        let mut call = prepared(&self.swap, [copy, counter]);
        call.arg(&counter.name).arg(seen);
        let verdict: Verdict = self.link.run(&call)?;
        if verdict.0 == 2 {
            return Ok(false);
        }
        judge(verdict, &[copy, counter]).map(|()| true)
    }

    /// Removes counters and their copies, given in turn; gives the number of those that were there.
    pub(crate) fn drop(&mut self, counters: &[&Counter]) -> Result<u64, SinkError> {
        let mut call = prepared(&self.drop, counters.iter().copied());
        call.arg(self.space.pipeline());
        for counter in counters.iter().step_by(2) {
            call.arg(&counter.name);
        }
        self.link.run(&call)
    }

    /// A part of a counter's value, as `part.lua` scans it, and what is seen of the counter at that moment.
    pub(crate) fn scan(
        &mut self,
        counter: &Counter,
        cursor: &str,
    ) -> Result<(String, String, Vec<String>), SinkError> {
        let groups = self.writing.piece();
        let mut call = prepared(&self.part, [counter]);
        call.arg(&counter.name).arg("scan").arg(cursor).arg(groups);
        timed(&mut self.link, &mut self.writing, &call, groups)
    }

    /// Values of some groups, and what is seen of the counter at that moment.
    pub(crate) fn values(
        &mut self,
        counter: &Counter,
        groups: &[String],
    ) -> Result<(String, Vec<Option<String>>), SinkError> {
        let mut call = prepared(&self.part, [counter]);
        call.arg(&counter.name).arg("groups").arg(groups);
        let (seen, _, values): (String, String, Vec<Option<String>>) = self.link.run(&call)?;
        Ok((seen, values))
    }

    /// Names of counters and the pipelines that own them.
    pub(crate) fn owners(&mut self) -> Result<Vec<(String, String)>, SinkError> {
        let mut command = redis::cmd("HGETALL");
        command.arg(self.space.owners_key());
        self.link.with(|connection| command.query(connection))
    }
}

/// Which of a counter's keys are read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Place {
    Live,
    Staged,
}

/// Groups to read of a counter.
pub(crate) struct Wanted<'a> {
    pub(crate) counter: &'a Counter,
    pub(crate) expected: &'a str,
    /// The token under which a large commit is under way; empty for none.
    pub(crate) token: &'a str,
    pub(crate) from: Place,
    pub(crate) groups: &'a [&'a str],
}

/// Runs a script that does a piece of one counter's work, and gives its answer.
fn piece(
    link: &mut Link,
    script: &Script,
    pace: &mut Pace,
    counter: &Counter,
    fields: usize,
    arguments: impl FnOnce(&mut ScriptInvocation<'_>),
) -> Result<String, SinkError> {
    let mut call = prepared(script, [counter]);
    arguments(&mut call);
    let (place, answer): Verdict = timed(link, pace, &call, fields)?;
    judge((place, answer.clone()), &[counter])?;
    Ok(answer)
}

/// Runs a script that touches so many fields, and takes the time.
fn timed<T: FromRedisValue>(
    link: &mut Link,
    pace: &mut Pace,
    call: &ScriptInvocation<'_>,
    fields: usize,
) -> Result<T, SinkError> {
    let begun = Instant::now();
    let answer = link.run(call)?;
    pace.took(fields, begun.elapsed());
    Ok(answer)
}

/// Appends the checkpoint's fields as a counted list.
pub(crate) fn checkpoint_fields(call: &mut ScriptInvocation<'_>, held: &Held) {
    let fields = held.fields();
    call.arg(fields.len() * 2);
    for (field, content) in fields {
        call.arg(field).arg(content);
    }
}

fn prepared<'s, 'c>(
    script: &'s Script,
    counters: impl IntoIterator<Item = &'c Counter>,
) -> ScriptInvocation<'s> {
    let mut call = script.prepare_invoke();
    for counter in counters {
        for key in counter.keys.in_order() {
            call.key(key);
        }
    }
    call
}

fn judge((place, seen): Verdict, counters: &[&Counter]) -> Result<(), SinkError> {
    if place == 0 {
        return Ok(());
    }
    if place < 0 {
        return Err(missing_permission(&seen));
    }
    let counter = usize::try_from(place - 1).ok().and_then(|place| counters.get(place));
    let name = counter.map_or("?", |counter| counter.name.as_str());
    Err(SinkError::Moved(format!(
        "counter `{name}` is not where this worker left it; Redis has: {}",
        seen.replace('\n', " ")
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use change::Lsn;
    use worker::Checkpoint;

    use crate::shape::Aggregate;

    /// Whoever began last builds; the other's pieces would end up in a value that is not theirs.
    #[test]
    fn of_two_that_stage_only_the_later_goes_on() {
        let redis = testkit::services::Redis::start();
        let space = Namespace::new("", "p");
        let shape = Shape { aggregate: Aggregate::Rows, grouped: true };
        let counter = Counter { name: "c".into(), keys: space.counter("c"), shape, shown: true };
        let mut store = Store::new(&Server::new(redis.url()), space.clone()).unwrap();
        let seen = store.observe(&[&counter], true).unwrap().remove(0).text;
        let checkpoint = Checkpoint {
            log: "log".into(),
            generation: 1,
            next_offset: 1,
            lsn: Lsn(1),
            definition: "d".into(),
            ready: false,
            skipped: Vec::new(),
            last: None,
            stopped: None,
        };
        let held = Held { checkpoint, groups: 0 };
        store.reset(&counter, &seen, &held).unwrap();
        let expected = held.expected(&space, shape);
        let mut begin = |token: &str| {
            store.stage(&counter, 0, |call| {
                call.arg("begin").arg(token).arg("c").arg(&expected);
            })
        };
        begin("early").unwrap();
        begin("later").unwrap();
        let mut more = |token: &str| {
            store.stage(&counter, 1, |call| {
                call.arg("more").arg(token).arg(2).arg(token).arg(1).arg(0).arg(0).arg(0);
            })
        };
        assert!(matches!(more("early"), Err(SinkError::Moved(_))));
        more("later").unwrap();
        let staged: Vec<String> =
            redis::cmd("HKEYS").arg("millrace:p:c:staging:value").query(&mut redis.connect()).unwrap();
        assert_eq!(staged, ["later"]);

        // A staged value that is no longer whole does not replace the live one.
        redis::cmd("UNLINK").arg("millrace:p:c:staging:value").exec(&mut redis.connect()).unwrap();
        let swapped = store.commit(&[&counter], 1, |call| {
            call.arg(1).arg("c").arg(&expected).arg("later").arg(1).arg("swap");
            checkpoint_fields(call, &Held { groups: 1, ..held.clone() });
        });
        assert!(matches!(swapped, Err(SinkError::Moved(_))));
    }
}
