//! What can be seen of a counter at one moment, and what that means.
//!
//! A script (`scripts/counter.lua`) sees a counter as a text of [`LINES`] lines: its owner, its checkpoint's fields,
//! type and length of its value and of its hidden counts. The same text serves three ends: it is judged when a
//! store is loaded; it is the expectation of every compare-and-set; and a check compares it with the last one.
//! A text of ours never has more lines than that, so equal texts are equal counters.

use change::Refusal;
use worker::{Checkpoint, Stopped};

use crate::keys::Namespace;
use crate::shape::Shape;
use crate::sql::Form;

/// The checkpoint's format written by this version.
const FORMAT: u32 = 1;
const UPGRADE: &str = "upgrade Millrace, or give this one a Redis prefix of its own";
/// Lines of an observation.
const LINES: usize = 20;
/// The checkpoint's fields, in the order of `counter.lua`. A checkpoint of an older version has no `last` and no
/// `stopped`, which are seen as empty; an older version that goes on with a newer checkpoint leaves them as they are.
const FIELDS: [&str; 11] = [
    "format",
    "log",
    "generation",
    "offset",
    "lsn",
    "definition",
    "groups",
    "state",
    "skipped",
    "last",
    "stopped",
];

/// A counter as our own commits leave it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Held {
    pub(crate) checkpoint: Checkpoint,
    /// Groups that the value has; 1 without GROUP BY.
    pub(crate) groups: u64,
}

/// Before the state in the checkpoint of a copy that is being changed in several scripts. What is between two of them is
/// neither the checkpoint's content nor the next one's; `tear.lua` keeps what takes it back. An older Millrace cannot read
/// such a checkpoint and fills the copy again.
const TORN: &str = "torn ";

/// What an observation means.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Judgement {
    /// Nothing is there.
    Empty,
    /// It is whole.
    At(Held),
    /// It is whole, but the owners' hash has lost its entry.
    Unclaimed(Held),
    /// It is ours, of another definition; how whole it is cannot be told.
    Other(Checkpoint),
    /// It is ours, and some of its groups are ahead of its checkpoint.
    Torn,
    /// It is ours and not whole.
    Damaged(String),
    /// It must not be touched.
    Refused(Refusal),
}

/// Type and length of a key.
type Key<'a> = (&'a str, &'a str);

struct Observation<'a> {
    owners: &'a str,
    owner: &'a str,
    checkpoint: &'a str,
    fields: [&'a str; FIELDS.len()],
    value: Key<'a>,
    rows: Key<'a>,
    nonnull: Key<'a>,
}

impl Held {
    /// The checkpoint's fields and their contents.
    pub(crate) fn fields(&self) -> [(&'static str, String); FIELDS.len()] {
        let at = &self.checkpoint;
        let contents = [
            FORMAT.to_string(),
            at.log.clone(),
            at.generation.to_string(),
            at.next_offset.to_string(),
            at.lsn.to_string(),
            at.definition.clone(),
            self.groups.to_string(),
            self.state().to_owned(),
            at.skipped.iter().map(i64::to_string).collect::<Vec<_>>().join(","),
            at.last.map_or_else(String::new, |last| last.to_string()),
            at.stopped.as_ref().map_or_else(String::new, |stop| format!("{} {}", stop.offset, stop.reason)),
        ];
        let mut contents = contents.into_iter();
        FIELDS.map(|field| (field, contents.next().unwrap_or_default()))
    }

    fn state(&self) -> &'static str {
        if self.checkpoint.ready { "ready" } else { "filling" }
    }

    /// The checkpoint's state while the counter is torn.
    pub(crate) fn torn_state(&self) -> String {
        format!("{TORN}{}", self.state())
    }

    /// How the scripts see a counter that is exactly so.
    pub(crate) fn expected(&self, space: &Namespace, shape: Shape) -> String {
        self.seen(space, shape, self.state(), self.groups)
    }

    /// How the scripts see the counter while it is torn and has this many groups.
    pub(crate) fn expected_torn(&self, space: &Namespace, shape: Shape, groups: u64) -> String {
        self.seen(space, shape, &self.torn_state(), groups)
    }

    fn seen(&self, space: &Namespace, shape: Shape, state: &str, groups: u64) -> String {
        let mut lines = vec!["hash".to_owned(), space.pipeline().to_owned(), "hash".to_owned()];
        let content = |(field, content)| if field == "state" { state.to_owned() } else { content };
        lines.extend(self.fields().into_iter().map(content));
        for (kind, length) in keys(shape, groups) {
            lines.push(kind.to_owned());
            lines.push(length.to_string());
        }
        lines.join("\n")
    }
}

/// Types and lengths of value, rows and nonnull of a counter that has this many groups.
fn keys(shape: Shape, groups: u64) -> [(&'static str, u64); 3] {
    let hash = |there: bool| if there && groups > 0 { ("hash", groups) } else { ("none", 0) };
    let value = if shape.grouped { hash(true) } else { ("string", 1) };
    [value, hash(shape.hides_rows()), hash(shape.hides_nonnull())]
}

/// Says what is there, or refuses to touch it.
pub(crate) fn judge(
    text: &str,
    counter: &str,
    space: &Namespace,
    shape: Shape,
    definition: &str,
) -> Judgement {
    judge_or_refuse(text, counter, space, shape, definition).unwrap_or_else(Judgement::Refused)
}

fn judge_or_refuse(
    text: &str,
    counter: &str,
    space: &Namespace,
    shape: Shape,
    definition: &str,
) -> Result<Judgement, Refusal> {
    let Some(seen) = Observation::parse(text) else {
        return Ok(Judgement::Damaged("its checkpoint cannot be read".to_owned()));
    };
    let claimed = seen.claimed(counter, space)?;
    if seen.checkpoint != "hash" {
        let whole_keys = [("checkpoint", seen.checkpoint), ("value", seen.value.0)];
        let hidden = [("hidden count", seen.rows.0), ("hidden count", seen.nonnull.0)];
        let mut left = whole_keys.into_iter().chain(hidden).filter(|(_, kind)| *kind != "none");
        return Ok(match left.next() {
            None => Judgement::Empty,
            Some(("checkpoint", kind)) => Judgement::Damaged(format!("its checkpoint is a {kind}")),
            Some((what, _)) => Judgement::Damaged(format!("it has a {what} but no checkpoint")),
        });
    }
    newer(&seen, counter)?;
    let Some(held) = seen.held() else {
        return Ok(Judgement::Damaged("its checkpoint cannot be read".to_owned()));
    };
    if !held.checkpoint.is_of(definition) {
        return Ok(Judgement::Other(held.checkpoint));
    }
    if Form::read(&held.checkpoint.definition).is_none() {
        return Err(Refusal::new(
            format!(
                "the groups of counter `{counter}` are written in a form that this Millrace does not know"
            ),
            UPGRADE,
        ));
    }
    if torn(text) {
        return Ok(Judgement::Torn);
    }
    let found = [seen.value, seen.rows, seen.nonnull];
    let names = ["value", "hidden count of rows", "hidden count of values"];
    for ((name, (kind, length)), expected) in names.iter().zip(found).zip(keys(shape, held.groups)) {
        if (kind, length) != (expected.0, &*expected.1.to_string()) {
            let (expected, expected_length) = expected;
            return Ok(Judgement::Damaged(format!(
                "its {name} is a {kind} of {length} where its checkpoint says {expected} of {expected_length}"
            )));
        }
    }
    Ok(if claimed { Judgement::At(held) } else { Judgement::Unclaimed(held) })
}

/// The checkpoint in an observation, for programs that only look; `None` when there is none.
pub(crate) fn checkpoint(seen: &str, counter: &str) -> Result<Option<Held>, Refusal> {
    let Some(seen) = Observation::parse(seen) else { return Ok(None) };
    if seen.checkpoint != "hash" {
        return Ok(None);
    }
    newer(&seen, counter)?;
    Ok(seen.held())
}

/// Whether some groups of the counter are ahead of its checkpoint.
pub(crate) fn torn(seen: &str) -> bool {
    Observation::parse(seen).is_some_and(|seen| seen.state().starts_with(TORN))
}

/// The state that the checkpoint of a torn counter has once the change was taken back.
pub(crate) fn state_before(seen: &str) -> Option<&str> {
    Observation::parse(seen)?.state().strip_prefix(TORN)
}

/// Whether there is a checkpoint, readable or not.
pub(crate) fn exists(seen: &str) -> bool {
    Observation::parse(seen).is_none_or(|seen| seen.checkpoint != "none")
}

fn newer(seen: &Observation<'_>, counter: &str) -> Result<(), Refusal> {
    match seen.fields[0].parse::<u32>() {
        Ok(format) if format > FORMAT => Err(Refusal::new(
            format!(
                "the checkpoint of counter `{counter}` has format {format}; this Millrace reads {FORMAT}"
            ),
            UPGRADE,
        )),
        _ => Ok(()),
    }
}

impl<'a> Observation<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        let lines: [&str; LINES] = text.split('\n').collect::<Vec<_>>().try_into().ok()?;
        let mut fields = [""; FIELDS.len()];
        fields.copy_from_slice(&lines[3..14]);
        let key = |place: usize| (lines[place], lines[place + 1]);
        Some(Observation {
            owners: lines[0],
            owner: lines[1],
            checkpoint: lines[2],
            fields,
            value: key(14),
            rows: key(16),
            nonnull: key(18),
        })
    }

    /// Whether the owners' hash names this pipeline. Refuses what belongs to somebody else.
    fn claimed(&self, counter: &str, space: &Namespace) -> Result<bool, Refusal> {
        let elsewhere = "set [redis] prefix to keep Millrace's keys apart";
        if self.owners != "hash" {
            let what = format!("the Redis key `{}` is a {}, not Millrace's", space.owners_key(), self.owners);
            return Err(Refusal::new(what, format!("delete it, or {elsewhere}")));
        }
        if self.owner == space.pipeline() {
            return Ok(true);
        }
        let value = space.value_key(counter);
        if !self.owner.is_empty() {
            let what = format!("the Redis key `{value}` is a counter of the pipeline `{}`", self.owner);
            return Err(Refusal::new(what, format!("rename the counter, or {elsewhere}")));
        }
        if self.checkpoint == "hash" {
            return Ok(false);
        }
        let checkpoint = space.checkpoint_key(counter);
        for (key, kind) in [(value, self.value.0), (checkpoint, self.checkpoint)] {
            if kind != "none" {
                let what = format!("the Redis key `{key}` is there already, a {kind} that is not Millrace's");
                return Err(Refusal::new(
                    what,
                    format!("redis-cli UNLINK '{key}', if nobody needs it; or {elsewhere}"),
                ));
            }
        }
        Ok(false)
    }

    fn state(&self) -> &'a str {
        self.fields[7]
    }

    fn held(&self) -> Option<Held> {
        let [format, log, generation, offset, lsn, definition, groups, state, skipped, last, stopped] =
            self.fields;
        format.parse::<u32>().ok().filter(|format| *format > 0)?;
        let ready = match state.strip_prefix(TORN).unwrap_or(state) {
            "ready" => true,
            "filling" => false,
            _ => return None,
        };
        let checkpoint = Checkpoint {
            log: (!log.is_empty()).then(|| log.to_owned())?,
            generation: generation.parse().ok()?,
            next_offset: offset.parse().ok()?,
            lsn: lsn.parse().ok()?,
            definition: definition.to_owned(),
            ready,
            skipped: skipped
                .split_terminator(',')
                .map(|offset| offset.parse().ok())
                .collect::<Option<_>>()?,
            last: if last.is_empty() { None } else { Some(last.parse().ok()?) },
            stopped: match stopped.split_once(' ') {
                Some((offset, reason)) => Some(Stopped::new(offset.parse().ok()?, reason)),
                None if stopped.is_empty() => None,
                None => return None,
            },
        };
        Some(Held { checkpoint, groups: groups.parse().ok()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::Aggregate;
    use change::Lsn;

    const SHAPE: Shape = Shape { aggregate: Aggregate::Sum, grouped: true };

    fn held(groups: u64) -> Held {
        let checkpoint = Checkpoint {
            log: "log".into(),
            generation: 1,
            next_offset: 7,
            lsn: Lsn(0x1A2B3C),
            definition: "d".into(),
            ready: true,
            skipped: vec![4, 6],
            last: "6 0/1A2B3C:t:5 00000000deadbeef".parse().ok(),
            stopped: Some(Stopped::new(8, "it is not JSON")),
        };
        Held { checkpoint, groups }
    }

    fn judged(text: &str) -> Result<Judgement, Refusal> {
        judge_or_refuse(text, "c", &Namespace::new("", "p"), SHAPE, "d")
    }

    fn seen(groups: u64) -> String {
        held(groups).expected(&Namespace::new("", "p"), SHAPE)
    }

    fn with(place: usize, line: &str) -> String {
        let text = seen(2);
        let mut lines: Vec<&str> = text.split('\n').collect();
        lines[place] = line;
        lines.join("\n")
    }

    #[test]
    fn what_was_written_is_read_back() {
        for groups in [0, 2] {
            assert_eq!(judged(&seen(groups)), Ok(Judgement::At(held(groups))));
        }
        assert_eq!(judged(&with(1, "")), Ok(Judgement::Unclaimed(held(2))));
    }

    #[test]
    fn a_checkpoint_of_an_older_version_names_no_last_record() {
        let mut old = held(2);
        (old.checkpoint.last, old.checkpoint.stopped) = (None, None);
        let expected = old.expected(&Namespace::new("", "p"), SHAPE);
        let lines: Vec<&str> = expected.split('\n').collect();
        assert_eq!(lines[12..14], ["", ""], "the expectation of the next compare-and-set");
        assert_eq!(judged(&expected), Ok(Judgement::At(old)));
    }

    #[test]
    fn damage_is_seen_in_every_part() {
        let damages = [(2, "none"), (2, "string"), (3, ""), (4, ""), (5, "x"), (6, ""), (7, "zz"), (9, "3")];
        let lengths = [
            (10, ""),
            (11, "4,x"),
            (12, "6 0/1A2B3C"),
            (13, "x"),
            (14, "none"),
            (15, "1"),
            (16, "string"),
            (17, "3"),
            (19, "0"),
        ];
        for (place, line) in damages.into_iter().chain(lengths) {
            let judged = judged(&with(place, line));
            assert!(matches!(judged, Ok(Judgement::Damaged(_))), "line {place} = {line}: {judged:?}");
        }
    }

    #[test]
    fn what_is_not_ours_is_refused() {
        assert!(matches!(judged(&with(8, "other")), Ok(Judgement::Other(_))));
        // Written in another form it is whole all the same.
        assert!(matches!(judged(&with(8, "d:n2")), Ok(Judgement::At(_))));
        for text in [with(0, "list"), with(1, "other"), with(3, "2"), with(8, "d:?")] {
            assert!(judged(&text).is_err(), "{text}");
        }
        let foreign = [
            "hash", "", "none", "", "", "", "", "", "", "", "", "", "", "", "hash", "5", "none", "0", "none",
            "0",
        ];
        assert!(judged(&foreign.join("\n")).is_err());
        let mut nothing = foreign;
        nothing[14] = "none";
        nothing[15] = "0";
        assert_eq!(judged(&nothing.join("\n")), Ok(Judgement::Empty));
    }
}
