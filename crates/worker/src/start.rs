//! Where a store starts: the decision, apart from the doing.

use change::{NEW_LOG, Refusal};

use crate::{Checkpoint, GroupOffset, LogState, StoreSpec, Stored};

/// What to do with a store before the log is read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Start {
    /// Go on from its checkpoint.
    Continue(Checkpoint),
    /// Build it from the log's beginning, where this checkpoint stands.
    Fill { beginning: Checkpoint, reason: String, shown: Shown },
    /// Go on from its checkpoint, and have a copy built from the log that is to take this one's place.
    Succeed(Checkpoint),
    /// It has gone over to a later log.
    Left,
    /// It has stopped, here if it is anywhere, and stays so.
    Stopped(Option<Checkpoint>),
}

/// What becomes of a store's content while it is built anew.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Shown {
    /// There is nothing, or nothing that is right.
    Nothing,
    /// It stays as it is, at this place: the log cannot continue it.
    Frozen(Checkpoint),
    /// It goes on following the log.
    Current(Checkpoint),
    /// It has stopped here, and stays so.
    Stopped(Checkpoint),
}

/// Decides from what the store holds, what the log is, and what the consumer group says.
///
/// The group's offset means something only when a reset tool wrote it: at the log's start it asks for a rebuild;
/// anywhere else it asks for what cannot be done without losing or doubling changes. That it is absent or expired
/// means nothing.
///
/// `replaced` says why the log is known not to continue the store, although it has the id in the store's checkpoint:
/// its records are others now. The store is filled again from the log's beginning, if that is there.
pub(crate) fn decide(
    spec: &StoreSpec,
    stored: &Stored,
    log: &LogState,
    replaced: Option<&str>,
) -> Result<Start, Refusal> {
    check_group(log)?;
    let reset = log.group.filter(|group| !group.ours);
    // What it shows is of a history that the source does not have any more.
    let lost = |at: &Checkpoint| match log.next {
        Some(next) if next.diverged => at.generation < next.generation,
        _ => log.diverged && at.generation < log.generation,
    };
    let newest = log.next.map(|next| next.generation);
    let (reason, shown) = match stored {
        Stored::Empty => ("it is empty".to_owned(), Shown::Nothing),
        Stored::Damaged(reason) => (reason.clone(), Shown::Nothing),
        Stored::Refused { refusal, .. } => return Err(refusal.clone()),
        Stored::At(checkpoint) if lost(checkpoint) => (LOST.to_owned(), Shown::Nothing),
        Stored::At(checkpoint) if !checkpoint.is_of(&spec.definition) => {
            ("its definition changed".to_owned(), Shown::Frozen(checkpoint.clone()))
        }
        Stored::At(checkpoint) if newest == Some(checkpoint.generation) => return Ok(Start::Left),
        Stored::At(checkpoint)
            if checkpoint.generation > log.generation && newest > Some(checkpoint.generation) =>
        {
            let reason = format!("it follows generation {}, which was given up", checkpoint.generation);
            (reason, Shown::Frozen(checkpoint.clone()))
        }
        Stored::At(checkpoint) => match (go_on(spec, checkpoint, log, replaced), reset, log.next) {
            (Ok(()), None, None) if checkpoint.definition != spec.definition => {
                (FORM.to_owned(), Shown::Current(checkpoint.clone()))
            }
            (Ok(()), None, None) => return Ok(Start::Continue(checkpoint.clone())),
            (Ok(()), _, Some(_)) => return Ok(Start::Succeed(checkpoint.clone())),
            (Err(refusal), _, Some(_)) => (refusal.what, Shown::Frozen(checkpoint.clone())),
            (Ok(()), Some(_), None) => (RESET.to_owned(), Shown::Current(checkpoint.clone())),
            (Err(_), Some(_), None) => (RESET.to_owned(), Shown::Frozen(checkpoint.clone())),
            (Err(_), None, None) if checkpoint.generation < log.generation => {
                let reason = format!("it follows generation {}", checkpoint.generation);
                (reason, Shown::Frozen(checkpoint.clone()))
            }
            (Err(refusal), None, None) if replaced.is_some() || checkpoint.was_replaced_in(&log.id) => {
                (refusal.what, Shown::Frozen(checkpoint.clone()))
            }
            (Err(refusal), None, None) => return Err(refusal),
        },
    };
    Ok(Start::Fill { beginning: beginning(spec, log, &reason)?, reason, shown })
}

/// Refuses what the consumer group asks for, if that cannot be done. No store is at fault.
pub(crate) fn check_group(log: &LogState) -> Result<(), Refusal> {
    match log.group {
        Some(GroupOffset { offset, ours: false }) if offset != log.start => Err(Refusal::new(
            format!(
                "the consumer group was reset to offset {offset}; a store can only be built from the log's start, \
                 offset {}",
                log.start
            ),
            "reset the group with `--reset-offsets --to-earliest`, or delete its offset to go on where the store \
             stands",
        )),
        _ => Ok(()),
    }
}

const FORM: &str = "its content has another form than the types of its table ask for";
const RESET: &str = "the consumer group was reset to the log's start";
const REPLACED: &str = "the log has other records now than those it was built from";
const LOST: &str = "the source was restored to an earlier point or is another one";

/// Where a copy goes on, if it can; else where it begins, and why. Nobody sees a copy, so one that does not fit is no
/// loss.
pub(crate) fn decide_copy<'s>(
    spec: &StoreSpec,
    stored: &'s Stored,
    log: &LogState,
    replaced: Option<&'s str>,
) -> Result<(Checkpoint, Option<&'s str>), Refusal> {
    let reason = match stored {
        Stored::At(at) if at.definition == spec.definition && go_on(spec, at, log, replaced).is_ok() => {
            return Ok((at.clone(), None));
        }
        Stored::At(_) => replaced.unwrap_or("its copy belongs to another definition or log"),
        Stored::Damaged(reason) => reason,
        Stored::Refused { refusal, .. } => return Err(refusal.clone()),
        Stored::Empty => "it has just been asked for",
    };
    Ok((beginning(spec, log, reason)?, Some(reason)))
}

/// The checkpoint of a store that holds nothing yet of a log that is there from its beginning. Where the log has a
/// successor it does not matter that it is not: the store is built from that.
fn beginning(spec: &StoreSpec, log: &LogState, reason: &str) -> Result<Checkpoint, Refusal> {
    if log.start > 0 && log.next.is_none() {
        return Err(Refusal::new(
            format!(
                "{} must be filled from the log's beginning ({reason}), but retention has removed the records \
                 below offset {}",
                spec.name, log.start
            ),
            format!("{NEW_LOG}; and keep the log topic's retention.ms and retention.bytes at -1"),
        ));
    }
    Ok(Checkpoint::beginning(&log.id, log.generation, &spec.definition))
}

/// Refuses a checkpoint that this log cannot continue.
fn go_on(spec: &StoreSpec, at: &Checkpoint, log: &LogState, replaced: Option<&str>) -> Result<(), Refusal> {
    let name = &spec.name;
    let refuse = |what: String| {
        let remedy = "if that was on purpose, have the stores built anew: with the worker stopped, \
                      kafka-consumer-groups --reset-offsets --to-earliest on its group";
        Err(Refusal::new(what, remedy))
    };
    if let Some(reason) = replaced {
        return refuse(reason.to_owned());
    }
    if at.generation == log.generation && at.was_replaced_in(&log.id) {
        return refuse(REPLACED.to_owned());
    }
    if (&at.log, at.generation) != (&log.id, log.generation) {
        return refuse(format!(
            "{name} was built from the log {} (generation {}), but the topic now holds the log {} (generation {})",
            at.log, at.generation, log.id, log.generation
        ));
    }
    if at.next_offset > log.end {
        return refuse(format!(
            "{name} stands at offset {} but the log ends at {}: records were lost",
            at.next_offset, log.end
        ));
    }
    if at.next_offset < log.start {
        return refuse(format!(
            "{name} stands at offset {} but retention has removed the records below {}",
            at.next_offset, log.start
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use change::Lsn;

    use super::*;
    use crate::Successor;

    fn spec() -> StoreSpec {
        StoreSpec { name: "counters.unread".into(), definition: "d".into() }
    }

    fn log() -> LogState {
        LogState {
            id: "a".into(),
            generation: 2,
            diverged: false,
            start: 0,
            end: 100,
            group: None,
            next: None,
        }
    }

    fn at(next_offset: i64) -> Checkpoint {
        Checkpoint {
            log: "a".into(),
            generation: 2,
            next_offset,
            lsn: Lsn(7),
            definition: "d".into(),
            ready: true,
            skipped: Vec::new(),
            last: None,
            stopped: None,
        }
    }

    fn outcome(stored: Stored, change: impl FnOnce(&mut LogState)) -> String {
        decided(&spec(), stored, None, change)
    }

    fn decided(
        spec: &StoreSpec,
        stored: Stored,
        replaced: Option<&str>,
        change: impl FnOnce(&mut LogState),
    ) -> String {
        let mut log = log();
        change(&mut log);
        match decide(spec, &stored, &log, replaced) {
            Ok(Start::Continue(at)) => format!("continue at {}", at.next_offset),
            Ok(Start::Fill { beginning, reason, shown }) => {
                let shown = match shown {
                    Shown::Nothing => "nothing".to_owned(),
                    Shown::Frozen(_) => "frozen".to_owned(),
                    Shown::Current(at) => format!("goes on at {}", at.next_offset),
                    Shown::Stopped(at) => format!("stopped at {}", at.next_offset),
                };
                format!("fill from {} ({shown}): {reason}", beginning.next_offset)
            }
            Ok(Start::Succeed(at)) => format!("goes on at {} and is built from the next log", at.next_offset),
            Ok(Start::Left) => "left".to_owned(),
            Ok(Start::Stopped(_)) => "stopped".to_owned(),
            Err(refusal) => format!("refused: {}", refusal.what),
        }
    }

    #[test]
    fn a_store_goes_over_to_the_log_that_takes_its_logs_place() {
        let of = |generation| Stored::At(Checkpoint { log: "b".into(), generation, ..at(42) });
        let next =
            |diverged| move |log: &mut LogState| log.next = Some(Successor { generation: 3, diverged });
        assert_eq!(outcome(Stored::At(at(42)), next(false)), "goes on at 42 and is built from the next log");
        assert!(outcome(Stored::At(at(42)), next(true)).starts_with("fill from 0 (nothing)"));
        assert!(
            outcome(Stored::At(at(101)), next(false)).starts_with("fill from 0 (frozen)"),
            "a log that lost records"
        );
        assert_eq!(outcome(of(3), next(false)), "left");
        assert_eq!(outcome(of(3), next(true)), "left");
        // The next log was lost as well, and another is to take its place.
        let third =
            |diverged| move |log: &mut LogState| log.next = Some(Successor { generation: 4, diverged });
        assert!(outcome(of(3), third(false)).starts_with("fill from 0 (frozen): it follows generation 3"));
        assert!(outcome(of(3), third(true)).starts_with("fill from 0 (nothing)"));
        let other = |generation| {
            Stored::At(Checkpoint { log: "b".into(), generation, definition: "e".into(), ..at(42) })
        };
        assert!(outcome(other(2), next(true)).starts_with("fill from 0 (nothing)"));
        assert!(outcome(other(1), |log| log.diverged = true).starts_with("fill from 0 (nothing)"));
        // The log it followed is not the current one any more.
        assert!(outcome(of(1), |_| {}).starts_with("fill from 0 (frozen)"));
        assert!(outcome(of(1), |log| log.diverged = true).starts_with("fill from 0 (nothing)"));
        // Retention has taken the old log's beginning, which nobody needs any more.
        let cut = |log: &mut LogState| {
            (log.start, log.next) = (50, Some(Successor { generation: 3, diverged: false }))
        };
        assert!(outcome(Stored::At(at(42)), cut).starts_with("fill from 0 (frozen)"));
        assert!(outcome(Stored::Empty, cut).starts_with("fill from 0 (nothing)"));
    }

    #[test]
    fn a_store_goes_on_from_its_own_checkpoint() {
        assert_eq!(outcome(Stored::At(at(42)), |_| {}), "continue at 42");
        let ours = |log: &mut LogState| log.group = Some(GroupOffset { offset: 90, ours: true });
        assert_eq!(outcome(Stored::At(at(42)), ours), "continue at 42", "whatever the group says");
    }

    #[test]
    fn an_empty_damaged_or_redefined_store_is_filled_from_the_beginning() {
        assert_eq!(outcome(Stored::Empty, |_| {}), "fill from 0 (nothing): it is empty");
        assert_eq!(outcome(Stored::Damaged("torn".into()), |_| {}), "fill from 0 (nothing): torn");
        let other = Checkpoint { definition: "e".into(), ..at(42) };
        assert_eq!(outcome(Stored::At(other), |_| {}), "fill from 0 (frozen): its definition changed");
        assert!(outcome(Stored::Empty, |log| log.start = 5).contains("retention has removed"));
    }

    #[test]
    fn a_store_in_another_form_goes_on_while_it_is_built_again() {
        let stored = |definition: &str| Stored::At(Checkpoint { definition: definition.into(), ..at(42) });
        let formed = |definition: &str, change: fn(&mut LogState)| {
            let spec = StoreSpec { definition: "d:n2".into(), ..spec() };
            decided(&spec, stored(definition), None, change)
        };
        assert_eq!(formed("d:n2", |_| {}), "continue at 42");
        for older in ["d", "d:n3"] {
            let expected = format!("fill from 0 (goes on at 42): {FORM}");
            assert_eq!(formed(older, |_| {}), expected);
        }
        assert_eq!(outcome(stored("d:n2"), |_| {}), format!("fill from 0 (goes on at 42): {FORM}"));
        assert_eq!(formed("e:n2", |_| {}), "fill from 0 (frozen): its definition changed");
        // Without the log's beginning it cannot be built again.
        let refused = formed("d", |log| log.start = 5);
        assert!(refused.starts_with("refused") && refused.contains(FORM), "{refused}");
        // What has gone over to the next log is that log's affair.
        let next = |log: &mut LogState| log.next = Some(Successor { generation: 3, diverged: false });
        let spec = StoreSpec { definition: "d:n2".into(), ..spec() };
        let gone = Checkpoint { log: "b".into(), generation: 3, ..at(42) };
        assert_eq!(decided(&spec, Stored::At(gone), None, next), "left");
        // A copy in another form begins again.
        let copy =
            decide_copy(&spec, &stored("d"), &log(), None).map(|(at, _)| (at.next_offset, at.definition));
        assert_eq!(copy, Ok((0, "d:n2".to_owned())));
    }

    #[test]
    fn h08_a_recreated_or_truncated_topic_is_refused() {
        assert!(outcome(Stored::At(at(42)), |log| log.id = "b".into()).contains("now holds the log b"));
        assert!(outcome(Stored::At(at(101)), |_| {}).contains("records were lost"));
        assert!(outcome(Stored::At(at(42)), |log| log.start = 43).contains("retention has removed"));
    }

    #[test]
    fn a_log_with_other_records_fills_the_store_again_where_it_is_whole() {
        let differs = Some("the record differs");
        let frozen = "fill from 0 (frozen): the record differs";
        assert_eq!(decided(&spec(), Stored::At(at(42)), differs, |_| {}), frozen);
        let next = |log: &mut LogState| log.next = Some(Successor { generation: 3, diverged: false });
        assert_eq!(decided(&spec(), Stored::At(at(42)), differs, next), frozen, "from the next log");
        let cut = |log: &mut LogState| log.start = 5;
        let refused = decided(&spec(), Stored::At(at(42)), differs, cut);
        assert!(refused.starts_with("refused") && refused.contains("(the record differs)"), "{refused}");
        // What was written into the checkpoint is enough for the next start.
        let replaced = || Stored::At(at(42).replaced());
        assert_eq!(outcome(replaced(), |_| {}), format!("fill from 0 (frozen): {REPLACED}"));
        assert!(outcome(replaced(), cut).starts_with("refused"));
        assert!(outcome(replaced(), next).starts_with("fill from 0 (frozen)"));
        assert!(outcome(replaced(), |log| log.id = "b".into()).starts_with("refused"));
        let other = Checkpoint { definition: "e".into(), ..at(42) };
        assert_eq!(
            decided(&spec(), Stored::At(other), differs, |_| {}),
            "fill from 0 (frozen): its definition changed"
        );
    }

    #[test]
    fn a_copy_goes_on_or_begins_anew_but_is_never_refused() {
        let copy = |stored: Stored| match decide_copy(&spec(), &stored, &log(), None) {
            Ok((at, _)) => at.next_offset,
            Err(refusal) => panic!("{refusal}"),
        };
        assert_eq!(copy(Stored::At(at(42))), 42);
        assert_eq!(copy(Stored::At(at(101))), 0);
        assert_eq!(copy(Stored::At(Checkpoint { log: "b".into(), ..at(42) })), 0);
        assert_eq!(copy(Stored::At(Checkpoint { definition: "e".into(), ..at(42) })), 0);
        assert_eq!(copy(Stored::Empty), 0);
        let (stored, log) = (Stored::At(at(42)), log());
        let differs = decide_copy(&spec(), &stored, &log, Some("the record differs"));
        assert_eq!(differs.map(|(at, reason)| (at.next_offset, reason)), Ok((0, Some("the record differs"))));
    }

    #[test]
    fn h43_only_an_untagged_reset_to_the_start_means_rebuild() {
        let reset = |offset| move |log: &mut LogState| log.group = Some(GroupOffset { offset, ours: false });
        assert_eq!(
            outcome(Stored::At(at(42)), reset(0)),
            "fill from 0 (goes on at 42): the consumer group was reset to the log's start"
        );
        let recreated = |log: &mut LogState| {
            reset(0)(log);
            log.id = "b".into();
        };
        assert_eq!(
            outcome(Stored::At(at(42)), recreated),
            "fill from 0 (frozen): the consumer group was reset to the log's start"
        );
        assert!(outcome(Stored::At(at(42)), reset(17)).contains("refused"));
    }
}
