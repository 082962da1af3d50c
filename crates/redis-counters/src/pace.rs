//! The size of a script, from the time that earlier ones took.
//!
//! Redis serves one command at a time, so every other client waits for a script. What a field costs differs by a factor of ten
//! between a hash that a processor's cache holds and one of 20 million fields, and between machines: it is measured.

use std::time::Duration;

/// Nanoseconds per field before anything was measured: a write into a hash of 20 million fields on a slow machine.
const FIRST_WRITE: f64 = 4_000.0;
/// The same for a copied field. The first fields of a copy take longest: they come in the order of the hash's buckets, which
/// fills few buckets of the small hash that the copy then is.
const FIRST_COPY: f64 = 20_000.0;
/// Scripts of fewer fields say more about the network than about fields.
const MEASURED_FIELDS: usize = 200;
/// Least and most that a field can cost, nanoseconds.
const NS: (f64, f64) = (200.0, 200_000.0);
/// A script that took longer than this many times what was expected was interrupted: it counts for no more.
const SURPRISE: f64 = 2.0;
/// Fields of one of many scripts, least and most.
const PIECE_FIELDS: (usize, usize) = (50, 8_000);

/// The measured cost of a field, and what follows from it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    longest: Duration,
    first_ns: f64,
    field_ns: f64,
}

impl Pace {
    /// For scripts that write. None is meant to take longer than `longest`.
    pub(crate) fn of_writes(longest: Duration) -> Self {
        Pace { longest, first_ns: FIRST_WRITE, field_ns: FIRST_WRITE }
    }

    /// For scripts that copy.
    pub(crate) fn of_copies(longest: Duration) -> Self {
        Pace { longest, first_ns: FIRST_COPY, field_ns: FIRST_COPY }
    }

    /// Another hash: what was measured does not hold for it.
    pub(crate) fn restart(&mut self) {
        self.field_ns = self.first_ns;
    }

    /// A script with this many fields was answered after this time. Slow ones count for more than quick ones.
    pub(crate) fn took(&mut self, fields: usize, time: Duration) {
        if fields < MEASURED_FIELDS {
            return;
        }
        let ns = (time.as_nanos() as f64 / fields as f64).min(self.field_ns * SURPRISE);
        let weight = if ns > self.field_ns { 0.25 } else { 0.1 };
        self.field_ns = (self.field_ns + (ns - self.field_ns) * weight).clamp(NS.0, NS.1);
    }

    /// Most fields of a script that cannot be divided. A field counts for no more than at first, for it is others that slow
    /// such a server down, and the alternative is a copy of the whole counter.
    pub(crate) fn most(&self) -> usize {
        self.fields(1.0, self.field_ns.min(self.first_ns)).max(PIECE_FIELDS.0)
    }

    /// Fields at which changes that could still grow are written: what one more transaction adds then fits as well.
    pub(crate) fn enough(&self) -> usize {
        self.most() * 3 / 5
    }

    /// Fields of one of many scripts.
    pub(crate) fn piece(&self) -> usize {
        self.fields(0.25, self.field_ns).clamp(PIECE_FIELDS.0, PIECE_FIELDS.1)
    }

    fn fields(&self, part: f64, field_ns: f64) -> usize {
        let fields = self.longest.as_nanos() as f64 * part / field_ns;
        // A float becomes the nearest number that there is.
        fields as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_follow_the_measured_cost_of_a_field() {
        let ms = Duration::from_millis;
        let mut pace = Pace::of_writes(ms(40));
        assert_eq!((pace.most(), pace.enough(), pace.piece()), (10_000, 6_000, 2_500));
        pace.took(1_000, Duration::from_secs(3_600));
        assert_eq!(pace.piece(), 2_000, "one interruption does not change much");
        pace.took(100, ms(100));
        assert_eq!(pace.piece(), 2_000, "few fields say nothing");
        for _ in 0..100 {
            pace.took(1_000, ms(1));
        }
        assert!((39_000..41_000).contains(&pace.most()), "{pace:?}");
        assert_eq!(pace.piece(), PIECE_FIELDS.1);
        for _ in 0..100 {
            pace.took(1_000, ms(100));
        }
        assert_eq!((pace.most(), pace.piece()), (10_000, 100));
        let none = Pace::of_writes(Duration::ZERO);
        assert!(none.most() > 0 && none.enough() > 3 && none.piece() > 0, "a group of every shape fits");
    }
}
