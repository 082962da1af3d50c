//! Dates and timestamps from Postgres's ISO text, as numbers that order as Postgres orders them.
//!
//! Accepts what Postgres prints under `DateStyle = ISO` and `TimeZone = UTC`, years beyond 9999 and BC
//! included, and for literals the unambiguous ISO forms. What depends on a session's settings (`1/8/1999`,
//! `now`, a zone's name) is not read.

const MICROS_PER_SECOND: i64 = 1_000_000;
const MICROS_PER_DAY: i64 = 86_400 * MICROS_PER_SECOND;

/// From 0000-03-01 to 2000-01-01.
const DAYS_TO_2000: i64 = 730_425;

/// Latest years that Postgres can hold, and the earliest that is whole.
const MAX_DATE_YEAR: i64 = 5_874_897;
const MAX_TIMESTAMP_YEAR: i64 = 294_276;
const MIN_YEAR: i64 = -4_712;

/// A moment as written, before anyone says what type it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Moment {
    /// `-infinity`.
    Past,
    /// `infinity`.
    Future,
    At {
        /// Astronomical: 1 BC is 0.
        year: i64,
        /// Since 2000-01-01, as Postgres counts: from 1970 its last years would not fit 64 bits of microseconds.
        day: i64,
        /// Since midnight, where a time of day is given.
        micros: Option<i64>,
        /// East of UTC, in seconds, where an offset is given.
        offset: Option<i64>,
    },
}

impl Moment {
    pub(crate) fn parse(text: &str) -> Option<Moment> {
        match text {
            "infinity" => return Some(Moment::Future),
            "-infinity" => return Some(Moment::Past),
            _ => {}
        }
        let (text, bc) = match text.strip_suffix(" BC") {
            Some(text) => (text, true),
            None => (text, false),
        };
        let (date, time) = match text.split_once([' ', 'T']) {
            Some((date, time)) => (date, Some(time)),
            None => (text, None),
        };
        let (year, day) = date_of(date, bc)?;
        let Some(time) = time else { return Some(Moment::At { year, day, micros: None, offset: None }) };
        let (time, offset) = match time.find(['Z', '+', '-']) {
            Some(at) => (&time[..at], Some(offset_of(&time[at..])?)),
            None => (time, None),
        };
        Some(Moment::At { year, day, micros: Some(time_of(time)?), offset })
    }

    /// Days, for type date. The time of day does not count.
    pub(crate) fn days(self) -> i64 {
        match self {
            Moment::Past => i64::MIN,
            Moment::Future => i64::MAX,
            Moment::At { day, .. } => day,
        }
    }

    /// Microseconds of UTC, for the timestamp types.
    pub(crate) fn micros(self) -> Option<i64> {
        match self {
            Moment::Past => Some(i64::MIN),
            Moment::Future => Some(i64::MAX),
            Moment::At { day, micros, offset, .. } => {
                let local = day.checked_mul(MICROS_PER_DAY)?.checked_add(micros.unwrap_or(0))?;
                local.checked_sub(offset.unwrap_or(0) * MICROS_PER_SECOND)
            }
        }
    }

    /// Whether a literal like this is surely within the range of type date.
    pub(crate) fn fits_date(self) -> bool {
        self.within(MAX_DATE_YEAR)
    }

    /// Whether a literal like this is surely within the range of the timestamp types.
    pub(crate) fn fits_timestamp(self) -> bool {
        self.within(MAX_TIMESTAMP_YEAR - 1)
    }

    fn within(self, max_year: i64) -> bool {
        match self {
            Moment::Past | Moment::Future => true,
            Moment::At { year, .. } => (MIN_YEAR..=max_year).contains(&year),
        }
    }
}

/// Year and days since 2000-01-01 of `2025-01-19`.
fn date_of(text: &str, bc: bool) -> Option<(i64, i64)> {
    let mut parts = text.split('-');
    let year = number(parts.next()?, 4..=7)?;
    let month = number(parts.next()?, 2..=2)?;
    let day = number(parts.next()?, 2..=2)?;
    if parts.next().is_some() || year == 0 {
        return None;
    }
    let year = if bc { 1 - year } else { year };
    let leap = (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
    let days_in_month = match month {
        1 | 3 | 5 | 7 | 8 | 10 | 12 => 31,
        4 | 6 | 9 | 11 => 30,
        2 => 28 + i64::from(leap),
        _ => return None,
    };
    if !(1..=days_in_month).contains(&day) {
        return None;
    }
    Some((year, days_from_civil(year, month, day)))
}

/// Days since 2000-01-01 in the proleptic Gregorian calendar.
/// Source: <https://howardhinnant.github.io/date_algorithms.html#days_from_civil>.
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - DAYS_TO_2000
}

/// Microseconds since midnight of `12:34`, `12:34:56` or `12:34:56.123456`.
fn time_of(text: &str) -> Option<i64> {
    let (clock, fraction) = text.split_once('.').map_or((text, None), |(clock, part)| (clock, Some(part)));
    let (hour, minute, second) = clock_of(clock, fraction.is_some())?;
    let fraction = match fraction {
        Some(digits) => number(digits, 1..=6)? * 10_i64.pow(6 - u32::try_from(digits.len()).ok()?),
        None => 0,
    };
    if hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    Some(((hour * 60 + minute) * 60 + second) * MICROS_PER_SECOND + fraction)
}

/// Seconds east of UTC of `Z`, `+02`, `-03:30` or `+00:19:32`.
fn offset_of(text: &str) -> Option<i64> {
    if text == "Z" {
        return Some(0);
    }
    let (sign, digits) = match text.strip_prefix('-') {
        Some(digits) => (-1, digits),
        None => (1, text.strip_prefix('+')?),
    };
    let (hour, minute, second) = match digits.contains(':') {
        true => clock_of(digits, false)?,
        false => (number(digits, 2..=2)?, 0, 0),
    };
    if hour > 15 || minute > 59 || second > 59 {
        return None;
    }
    Some(sign * ((hour * 60 + minute) * 60 + second))
}

fn clock_of(text: &str, needs_seconds: bool) -> Option<(i64, i64, i64)> {
    let mut parts = text.split(':');
    let hour = number(parts.next()?, 2..=2)?;
    let minute = number(parts.next()?, 2..=2)?;
    let second = match parts.next() {
        Some(digits) => number(digits, 2..=2)?,
        None if needs_seconds => return None,
        None => 0,
    };
    parts.next().is_none().then_some((hour, minute, second))
}

fn number(digits: &str, length: std::ops::RangeInclusive<usize>) -> Option<i64> {
    let good = length.contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_digit());
    if good { digits.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordered_as_in_postgres() {
        let ascending = [
            "-infinity",
            "4713-01-01 00:00:00 BC",
            "0044-03-15 12:00:00 BC",
            "0001-12-31 23:59:59.999999 BC",
            "0001-01-01",
            "1969-12-31 23:59:59",
            "1970-01-01 00:00:00",
            "2024-02-29 00:00:00.000001",
            "2024-03-01",
            "9999-12-31",
            "10000-01-01",
            "294276-12-31 23:59:59.999999",
            "infinity",
        ];
        let values: Vec<_> =
            ascending.iter().map(|text| Moment::parse(text).unwrap().micros().unwrap()).collect();
        assert!(values.is_sorted_by(|a, b| a < b), "{values:?}");
    }

    #[test]
    fn known_instants() {
        let cases = [
            ("2000-01-01 00:00:00+00", 0),
            ("2000-01-01T02:00:00+02", 0),
            ("1999-12-31 20:30:00-03:30", 0),
            ("2000-01-01 00:19:32+00:19:32", 0),
            ("1970-01-01 00:01:40Z", 100 - 946_684_800),
        ];
        for (text, seconds) in cases {
            let micros = Moment::parse(text).unwrap().micros();
            assert_eq!(micros, Some(seconds * MICROS_PER_SECOND), "{text}");
        }
    }

    #[test]
    fn ambiguous_or_wrong_is_not_read() {
        let bad = [
            "",
            "now",
            "today",
            "1/8/1999",
            "2024-2-1",
            "24-02-01",
            "2023-02-29",
            "1900-02-29",
            "2024-13-01",
            "2024-01-32",
            "2024-01-01 25:00",
            "2024-01-01 24:00:00",
            "2024-01-01 10:60",
            "2024-01-01 10:00:60",
            "2024-01-01 10:00:00.1234567",
            "2024-01-01 10:00 +02",
            "2024-01-01 10:00:00 UTC",
            "0000-01-01",
            "2024-01-01 10:00:00+0200",
            "2024-01-01 10:00:00+16",
            "2024-01-01-01",
        ];
        for text in bad {
            assert_eq!(Moment::parse(text), None, "{text}");
        }
    }
}
