use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Which transactions a snapshot saw: `pg_current_snapshot()`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Snapshot {
    /// Every transaction below this had ended.
    xmin: u64,
    /// No transaction at or above this had ended, as others saw it.
    xmax: u64,
    /// Those between that had not ended; sorted.
    in_progress: Vec<u64>,
}

/// The text is not what `pg_current_snapshot()` prints.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("`{0}` is not a snapshot: expected xmin:xmax:xip,xip,...")]
pub struct ParseSnapshotError(pub String);

impl FromStr for Snapshot {
    type Err = ParseSnapshotError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let mut parts = text.splitn(3, ':');
            let xmin = parts.next()?.parse().ok()?;
            let xmax = parts.next()?.parse().ok()?;
            let list = parts.next()?.split(',').filter(|xid| !xid.is_empty());
            let mut in_progress = list.map(|xid| xid.parse().ok()).collect::<Option<Vec<u64>>>()?;
            in_progress.sort_unstable();
            Some(Snapshot { xmin, xmax, in_progress })
        };
        parse().ok_or_else(|| ParseSnapshotError(text.to_owned()))
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:", self.xmin, self.xmax)?;
        for (place, xid) in self.in_progress.iter().enumerate() {
            write!(f, "{}{xid}", if place == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

impl Serialize for Snapshot {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Snapshot {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl Snapshot {
    /// Whether every transaction that had ended for `other` had ended for this one.
    pub fn sees_all_of(&self, other: &Snapshot) -> bool {
        let open_for_other = |xid: &u64| other.in_progress.binary_search(xid).is_ok();
        // Where not every one of them is open for `other`, the first few tell.
        let beyond = (self.xmax..other.xmax).take(other.in_progress.len() + 1);
        let here = self.in_progress.iter().copied().filter(|xid| *xid < other.xmax);
        here.chain(beyond).all(|xid| open_for_other(&xid))
    }

    /// The transactions, their 32-bit xids, that had begun and not ended.
    pub fn in_progress(&self) -> impl Iterator<Item = u32> {
        self.in_progress.iter().map(|xid| *xid as u32)
    }

    /// The transactions, their 32-bit xids, that have ended for this one and had not for `earlier`.
    pub fn ended_since(&self, earlier: &Snapshot) -> impl Iterator<Item = u32> {
        let open = earlier.in_progress.iter().copied().chain(earlier.xmax..self.xmax);
        open.filter(|xid| self.ended(*xid)).map(|xid| xid as u32)
    }

    fn ended(&self, xid: u64) -> bool {
        xid < self.xmax && self.in_progress.binary_search(&xid).is_err()
    }

    /// Whether a transaction may be running. `next` is the 32-bit xid that the next one gets.
    pub fn any_open(&self, next: u32) -> bool {
        !self.in_progress.is_empty() || next != self.xmax as u32
    }

    /// Whether the snapshot saw the effects of a *committed* transaction, given its 32-bit xid.
    pub fn saw(&self, xid: u32) -> bool {
        self.ended(self.extend(xid))
    }

    /// The xid with its epoch: of all that end in these 32 bits, the nearest to the snapshot's.
    fn extend(&self, xid: u32) -> u64 {
        // The cast to 32 signed bits is Postgres' own comparison of xids.
        let distance = xid.wrapping_sub(self.xmax as u32) as i32;
        // Below the first epoch there is nothing.
        self.xmax.checked_add_signed(i64::from(distance)).unwrap_or(u64::from(xid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(text: &str) -> Snapshot {
        text.parse().unwrap()
    }

    #[test]
    fn h50_sees_what_had_ended() {
        let seen = |text: &str| (95..=106).filter(|xid| snapshot(text).saw(*xid)).collect::<Vec<u32>>();
        assert_eq!(seen("100:100:"), [95, 96, 97, 98, 99]);
        assert_eq!(seen("100:104:100,102"), [95, 96, 97, 98, 99, 101, 103]);
        assert_eq!(seen("97:103:99,97"), [95, 96, 98, 100, 101, 102]);
    }

    #[test]
    fn xids_get_their_epoch_from_the_nearest() {
        let epoch = 1_u64 << 32;
        // Just after a wraparound: xids before it belong to the epoch before.
        let after = snapshot(&format!("{}:{}:{}", 3 * epoch - 5, 3 * epoch + 20, 3 * epoch - 5));
        assert!(!after.saw(u32::MAX - 4), "the one in progress");
        assert!(after.saw(u32::MAX - 5) && after.saw(u32::MAX - 3) && after.saw(19));
        assert!(!after.saw(20) && !after.saw(21));
        // Just before one: those after it belong to the next epoch.
        let before = snapshot(&format!("{}:{}:", 3 * epoch - 20, 3 * epoch - 10));
        assert!(
            before.saw(u32::MAX - 10) && !before.saw(u32::MAX - 9) && !before.saw(3) && !before.saw(1000)
        );
        // Half a circle away is as far as it goes.
        let half = snapshot(&format!("{epoch}:{epoch}:"));
        assert!(half.saw(1 << 31) && !half.saw((1 << 31) - 1));
        // In the first epoch nothing is below zero.
        assert!(snapshot("800:800:").saw(3) && !snapshot("800:800:").saw(u32::MAX));
    }

    #[test]
    fn h21_one_snapshot_sees_all_that_another_sees() {
        let sees = |a: &str, b: &str| snapshot(a).sees_all_of(&snapshot(b));
        assert!(sees("100:100:", "100:100:") && sees("105:105:", "100:103:101"));
        assert!(!sees("100:100:", "101:101:"), "100 had ended for the other only");
        assert!(sees("100:100:", "100:101:100"), "it is open for both");
        assert!(!sees("99:104:99", "104:104:") && sees("99:104:99", "99:104:99,101"));
        assert!(!sees("100:100:", "100:1000000000000:100"), "and that is quickly found");
    }

    #[test]
    fn what_has_ended_since_an_earlier_one() {
        let since = |a: &str, b: &str| snapshot(a).ended_since(&snapshot(b)).collect::<Vec<_>>();
        assert_eq!(since("100:105:101", "97:103:97,101,102"), [97, 102, 103, 104]);
        assert_eq!(since("100:100:", "100:100:"), [0; 0]);
        assert_eq!(since("100:104:100,102", "100:102:100"), [103]);
        assert!(!snapshot("104:104:").any_open(104));
        assert!(snapshot("104:104:").any_open(105) && snapshot("100:104:100").any_open(104));
    }

    #[test]
    fn other_text_is_refused() {
        for text in ["", "1", "1:2", "a:b:", "1:2:x", "1:2:3;4", "-1:2:"] {
            assert!(text.parse::<Snapshot>().is_err(), "{text}");
        }
        assert_eq!(snapshot("1:9:5,3").to_string(), "1:9:3,5");
        assert_eq!(snapshot("7:7:").to_string(), "7:7:");
    }
}
