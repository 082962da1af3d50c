//! Where a store starts: the decision, apart from the doing.

use change::{Lsn, NEW_LOG, Refusal};

use crate::{Checkpoint, GroupOffset, LogState, StoreSpec, Stored};

/// What to do with a store before the log is read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Start {
    /// Go on from its checkpoint.
    Continue(Checkpoint),
    /// Empty it, give it this checkpoint and fill it from the log's beginning.
    Fill { checkpoint: Checkpoint, reason: String },
}

/// Decides from what the store holds, what the log is, and what the consumer group says.
///
/// The group's offset means something only when a reset tool wrote it: at the log's start it asks for a rebuild;
/// anywhere else it asks for what cannot be done without losing or doubling changes. That it is absent or expired
/// means nothing.
pub(crate) fn decide(spec: &StoreSpec, stored: &Stored, log: &LogState) -> Result<Start, Refusal> {
    if let Some(GroupOffset { offset, ours: false }) = log.group {
        if offset != log.start {
            return Err(Refusal::new(
                format!(
                    "the consumer group was reset to offset {offset}; a store can only be built from the log's \
                     start, offset {}",
                    log.start
                ),
                "reset the group with `--reset-offsets --to-earliest`, or delete its offset to go on where the \
                 store stands",
            ));
        }
        return fill(spec, log, "the consumer group was reset to the log's start");
    }
    match stored {
        Stored::Empty => fill(spec, log, "it is empty"),
        Stored::Damaged(reason) => fill(spec, log, reason),
        Stored::At(checkpoint) if checkpoint.definition != spec.definition => {
            fill(spec, log, "its definition changed")
        }
        Stored::At(checkpoint) => go_on(spec, checkpoint, log),
    }
}

fn fill(spec: &StoreSpec, log: &LogState, reason: &str) -> Result<Start, Refusal> {
    if log.start > 0 {
        return Err(Refusal::new(
            format!(
                "{} must be filled from the log's beginning ({reason}), but retention has removed the records \
                 below offset {}",
                spec.name, log.start
            ),
            format!("{NEW_LOG}; and keep the log topic's retention.ms and retention.bytes at -1"),
        ));
    }
    let checkpoint = Checkpoint {
        log: log.id.clone(),
        generation: log.generation,
        next_offset: 0,
        lsn: Lsn::ZERO,
        definition: spec.definition.clone(),
        ready: false,
        skipped: Vec::new(),
    };
    Ok(Start::Fill { checkpoint, reason: reason.to_owned() })
}

fn go_on(spec: &StoreSpec, at: &Checkpoint, log: &LogState) -> Result<Start, Refusal> {
    let name = &spec.name;
    let refuse = |what: String| {
        let remedy = "if that was on purpose, have the stores filled again: with the worker stopped, \
                      kafka-consumer-groups --reset-offsets --to-earliest on its group";
        Err(Refusal::new(what, remedy))
    };
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
    Ok(Start::Continue(at.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> StoreSpec {
        StoreSpec { name: "counters.unread".into(), definition: "d".into() }
    }

    fn log() -> LogState {
        LogState { id: "a".into(), generation: 1, start: 0, end: 100, group: None }
    }

    fn at(next_offset: i64) -> Checkpoint {
        Checkpoint {
            log: "a".into(),
            generation: 1,
            next_offset,
            lsn: Lsn(7),
            definition: "d".into(),
            ready: true,
            skipped: Vec::new(),
        }
    }

    fn outcome(stored: Stored, change: impl FnOnce(&mut LogState)) -> String {
        let mut log = log();
        change(&mut log);
        match decide(&spec(), &stored, &log) {
            Ok(Start::Continue(at)) => format!("continue at {}", at.next_offset),
            Ok(Start::Fill { checkpoint, reason }) => {
                format!("fill from {}: {reason}", checkpoint.next_offset)
            }
            Err(refusal) => format!("refused: {}", refusal.what),
        }
    }

    #[test]
    fn a_store_goes_on_from_its_own_checkpoint() {
        assert_eq!(outcome(Stored::At(at(42)), |_| {}), "continue at 42");
        let ours = |log: &mut LogState| log.group = Some(GroupOffset { offset: 90, ours: true });
        assert_eq!(outcome(Stored::At(at(42)), ours), "continue at 42", "whatever the group says");
    }

    #[test]
    fn an_empty_damaged_or_redefined_store_is_filled_from_the_beginning() {
        assert_eq!(outcome(Stored::Empty, |_| {}), "fill from 0: it is empty");
        assert_eq!(outcome(Stored::Damaged("torn".into()), |_| {}), "fill from 0: torn");
        let other = Checkpoint { definition: "e".into(), ..at(42) };
        assert_eq!(outcome(Stored::At(other), |_| {}), "fill from 0: its definition changed");
        assert!(outcome(Stored::Empty, |log| log.start = 5).contains("retention has removed"));
    }

    #[test]
    fn h08_a_recreated_or_truncated_topic_is_refused() {
        assert!(outcome(Stored::At(at(42)), |log| log.id = "b".into()).contains("now holds the log b"));
        assert!(outcome(Stored::At(at(101)), |_| {}).contains("records were lost"));
        assert!(outcome(Stored::At(at(42)), |log| log.start = 43).contains("retention has removed"));
    }

    #[test]
    fn h43_only_an_untagged_reset_to_the_start_means_rebuild() {
        let reset = |offset| move |log: &mut LogState| log.group = Some(GroupOffset { offset, ours: false });
        assert_eq!(
            outcome(Stored::At(at(42)), reset(0)),
            "fill from 0: the consumer group was reset to the log's start"
        );
        assert!(outcome(Stored::At(at(42)), reset(17)).contains("refused"));
    }
}
