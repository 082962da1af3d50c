use std::cmp::Ordering;

use change::{Key, TableSchema};

/// How the keys of a table compare, as far as that can be told without Postgres (h26).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct KeyOrder {
    columns: Vec<ColumnOrder>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum ColumnOrder {
    /// As numbers of at most 64 bits.
    Integer,
    /// As bytes: lower-case hexadecimal digits of one length or of `bytea`, booleans, text under `C`.
    Bytes,
    /// As bytes where both have a year of four digits after Christ.
    Time,
    /// Only the column's own operator and collation can tell.
    Postgres,
}

impl KeyOrder {
    pub(crate) fn of(schema: &TableSchema) -> Self {
        let order = |column: &change::Column| match column.type_oid {
            20 | 21 | 23 | 26 => ColumnOrder::Integer,
            16 | 17 | 2950 => ColumnOrder::Bytes,
            25 | 1043 if column.collation.as_ref().is_some_and(|c| c.bytewise && c.deterministic) => {
                ColumnOrder::Bytes
            }
            1082 | 1114 | 1184 => ColumnOrder::Time,
            _ => ColumnOrder::Postgres,
        };
        KeyOrder { columns: schema.key_columns().map(order).collect() }
    }

    /// The order of two keys of this table; `None` where Postgres must be asked.
    pub(crate) fn compare(&self, left: &Key, right: &Key) -> Option<Ordering> {
        if left == right {
            return Some(Ordering::Equal);
        }
        if left.len() != self.columns.len() || right.len() != self.columns.len() {
            return None;
        }
        for (order, (left, right)) in self.columns.iter().zip(left.iter().zip(right)) {
            let ordering = match order {
                ColumnOrder::Integer => left.parse::<i64>().ok()?.cmp(&right.parse().ok()?),
                ColumnOrder::Bytes => left.as_bytes().cmp(right.as_bytes()),
                ColumnOrder::Time if plain_time(left) && plain_time(right) => left.cmp(right),
                ColumnOrder::Time | ColumnOrder::Postgres if left == right => Ordering::Equal,
                ColumnOrder::Time | ColumnOrder::Postgres => return None,
            };
            if ordering.is_ne() {
                return Some(ordering);
            }
        }
        Some(Ordering::Equal)
    }
}

/// `2025-01-19` with or without a time: then the order of the bytes is the order in time, for a fraction's digits
/// end without zeros, and `+00` stands before `.`.
fn plain_time(text: &str) -> bool {
    let digits = |range: std::ops::Range<usize>| {
        text.get(range).is_some_and(|part| part.bytes().all(|b| b.is_ascii_digit()))
    };
    digits(0..4) && text.as_bytes().get(4) == Some(&b'-') && !text.ends_with("BC")
}

#[cfg(test)]
mod tests {
    use change::{Collation, Column, ReplicaIdentity};

    use super::*;

    fn order(types: &[u32], bytewise: bool) -> KeyOrder {
        let column = |(place, type_oid): (usize, &u32)| Column {
            name: format!("c{place}"),
            type_oid: *type_oid,
            type_name: String::new(),
            key: Some(place as u16 + 1),
            collation: Some(Collation { name: "x".into(), deterministic: true, bytewise }),
            number: None,
            recorded: None,
        };
        KeyOrder::of(&TableSchema {
            relation: 1,
            root: None,
            schema: "public".into(),
            table: "t".into(),
            identity: ReplicaIdentity::Default,
            columns: types.iter().enumerate().map(column).collect(),
        })
    }

    fn key(values: &[&str]) -> Key {
        values.iter().map(|value| (*value).to_owned()).collect()
    }

    #[test]
    fn h26_keys_are_compared_as_postgres_does_or_not_at_all() {
        let check = |type_oid, left, right, expected| {
            assert_eq!(
                order(&[type_oid], true).compare(&key(&[left]), &key(&[right])),
                expected,
                "{left} {right}"
            );
        };
        use Ordering::{Equal, Greater, Less};
        check(20, "-9", "10", Some(Less));
        check(20, "9", "10", Some(Less));
        check(26, "4294967295", "1", Some(Greater));
        check(16, "f", "t", Some(Less));
        check(
            2950,
            "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11",
            "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a12",
            Some(Less),
        );
        check(17, "\\x", "\\x00", Some(Less));
        check(17, "\\x0aff", "\\x0b", Some(Less));
        check(1082, "2024-12-31", "2025-01-01", Some(Less));
        check(1082, "12024-12-31", "2025-01-01", None);
        check(1082, "0044-03-15 BC", "2025-01-01", None);
        check(1082, "infinity", "2025-01-01", None);
        check(1114, "2025-01-01 00:00:00", "2025-01-01 00:00:00.5", Some(Less));
        check(1114, "2025-01-01 00:00:00.45", "2025-01-01 00:00:00.5", Some(Less));
        check(1184, "2025-01-01 00:00:00+00", "2025-01-01 00:00:00.1+00", Some(Less));
        check(25, "Z", "a", Some(Less));
        check(1700, "9", "10", None);
        check(1700, "9", "9", Some(Equal));
        check(1042, "a", "b", None);
        assert_eq!(order(&[25], false).compare(&key(&["a"]), &key(&["b"])), None);
    }

    #[test]
    fn h26_composite_keys_are_compared_column_by_column() {
        let order = order(&[23, 1700], true);
        assert_eq!(order.compare(&key(&["2", "9"]), &key(&["10", "1"])), Some(Ordering::Less));
        assert_eq!(order.compare(&key(&["2", "9"]), &key(&["2", "9"])), Some(Ordering::Equal));
        assert_eq!(order.compare(&key(&["2", "9"]), &key(&["2", "10"])), None);
        assert_eq!(order.compare(&key(&["2"]), &key(&["2", "10"])), None, "another key than it was");
    }
}
