//! Where a change stands in the total order of the log.
//!
//! An LSN alone does not order changes: every row of a transaction shares its commit LSN, a non-transactional
//! logical message can carry exactly the LSN that the next transaction's commit has, and a snapshot round takes
//! the LSN at which the stream paused, where the next commit record may start. Hence three parts, compared in
//! this order: LSN, kind, ordinal.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::lsn::cut;
use crate::{Lsn, json};

/// What stands at an LSN; at equal LSNs a message precedes a snapshot round, which precedes a transaction.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Kind {
    /// A non-transactional logical message.
    Message,
    /// A round of a snapshot.
    Round,
    /// A source transaction.
    Transaction,
}

impl Kind {
    fn code(self) -> &'static str {
        match self {
            Kind::Message => "m",
            Kind::Round => "r",
            Kind::Transaction => "t",
        }
    }
}

/// A change's place in the total order of a log. Written `0/16B3748:t:5`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    /// Commit LSN of a transaction, LSN of a message, pause LSN of a round.
    pub lsn: Lsn,
    /// What stands at that LSN.
    pub kind: Kind,
    /// Number of the change within its transaction, from 0, counted as decoded and before any filter. A change
    /// that becomes several records (a changed key, a TRUNCATE of several tables) has one ordinal.
    pub ordinal: u64,
}

impl Position {
    /// Before every change of every log.
    pub const START: Position = Position { lsn: Lsn::ZERO, kind: Kind::Message, ordinal: 0 };

    /// As it is displayed, without the formatter: this is done for every record.
    pub(crate) fn append_to(self, out: &mut Vec<u8>) {
        self.lsn.append_to(out);
        out.push(b':');
        out.extend_from_slice(self.kind.code().as_bytes());
        out.push(b':');
        json::number(out, self.ordinal);
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.lsn, self.kind.code(), self.ordinal)
    }
}

impl fmt::Debug for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text is not a position of the form `0/16B3748:t:5`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a position: expected LSN:kind:ordinal, as in 0/16B3748:t:5")]
pub struct ParsePositionError(pub String);

impl FromStr for Position {
    type Err = ParsePositionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (lsn, rest) = cut(text, b':')?;
            let (kind, ordinal) = cut(rest, b':')?;
            let lsn = lsn.parse().ok()?;
            let kind = match kind {
                "m" => Kind::Message,
                "r" => Kind::Round,
                "t" => Kind::Transaction,
                _ => return None,
            };
            let ordinal = ordinal.bytes().all(|b| b.is_ascii_digit()).then(|| ordinal.parse().ok())??;
            Some(Position { lsn, kind, ordinal })
        };
        parse().ok_or_else(|| ParsePositionError(text.to_owned()))
    }
}

impl Serialize for Position {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Position {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h01_equal_lsns_are_ordered_by_kind_and_ordinal() {
        let at = |kind, ordinal| Position { lsn: Lsn(100), kind, ordinal };
        let mut shuffled = [
            at(Kind::Transaction, 1),
            at(Kind::Round, 0),
            at(Kind::Transaction, 0),
            Position { lsn: Lsn(99), kind: Kind::Transaction, ordinal: 7 },
            at(Kind::Message, 0),
        ];
        shuffled.sort();
        let sorted: Vec<String> = shuffled.iter().map(Position::to_string).collect();
        assert_eq!(sorted, ["0/63:t:7", "0/64:m:0", "0/64:r:0", "0/64:t:0", "0/64:t:1"]);
    }

    #[test]
    fn text_round_trips_and_nonsense_is_refused() {
        for text in ["0/0:m:0", "0/16B3748:t:18446744073709551615", "1/2:r:3"] {
            assert_eq!(text.parse::<Position>().unwrap().to_string(), text);
        }
        for text in ["", "0/0", "0/0:t", "0/0:x:1", "0/0:t:-1", "0/0:t:+1", "0/0:t:1:2"] {
            assert!(text.parse::<Position>().is_err(), "{text}");
        }
    }
}
