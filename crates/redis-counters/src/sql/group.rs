//! How a group is written: values as Postgres prints them, so that `HGET` by the text of a query's answer finds it.
//!
//! Equal values of a column must be one group, so each is first brought to its shortest form (`1.50` to `1.5`, a
//! `character(n)` without its trailing blanks), and then to the form that the column's type prints:
//!
//! | type of the column | a group |
//! | --- | --- |
//! | `numeric(10,2)` | with its scale: `1.50`, `100.00` |
//! | `numeric`, `numeric(10,0)`, `numeric(3,-2)` | shortest: `1.5`, `100`. Of an unconstrained numeric Postgres itself prints whichever of the equal values it met. |
//! | `character(4)` | padded with blanks to four characters, however many bytes those are |
//! | `bpchar` without a length | shortest |
//! | any other | as it is |
//!
//! # When a column's type changes
//!
//! A store must not hold one group in two forms. So the form belongs to the *store*, not to a row: it is part of the
//! definition in the checkpoint ([`Form`]), and every row is written in it, whatever version of the table the row has.
//! That is safe because a form only adds to the shortest text: equal values stay one group and different ones stay
//! different under every form.
//!
//! The form that a store should have is that of the newest version of its table. Where the two differ, the store goes
//! on in its old form, not ready, while a copy is built in the new one, and the copy takes its place. This is the case after
//! `ALTER COLUMN ... TYPE` (from `numeric(10,2)` to `numeric`, which rewrites nothing, as well as to `numeric(10,3)`),
//! and for a store of an older Millrace, which wrote every group in its shortest form and had no form in its
//! checkpoint. Counters that group by no such column have no form, and are not built again.

use std::fmt;

use change::{Column, key};

use super::column_type::Type;
use super::decimal::trim_scale;

/// Separates the hash of a query from the form in a checkpoint's definition.
const SEPARATOR: char = ':';

/// How the values of one group column are written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Spelling {
    /// In their shortest form.
    #[default]
    Shortest,
    /// A numeric with at least this many digits after the point.
    Scale(u16),
    /// A `character(n)` with at least this many characters.
    Width(u32),
}

/// How a store's groups are written, column by column.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Form(Vec<Spelling>);

impl Form {
    /// The form that these group columns print.
    pub(crate) fn of<'c>(columns: impl Iterator<Item = &'c Column>) -> Form {
        Form(columns.map(Spelling::of).collect())
    }

    /// The form in a checkpoint's definition; `None` for one that this version does not know.
    pub(crate) fn read(definition: &str) -> Option<Form> {
        let Some((_, form)) = definition.split_once(SEPARATOR) else { return Some(Form::default()) };
        form.split(',').map(Spelling::read).collect::<Option<_>>().map(Form)
    }

    /// The definition of a store of this query that is written in this form.
    pub(crate) fn stamp(&self, hash: String) -> String {
        if self.0.iter().all(|spelling| *spelling == Spelling::Shortest) {
            return hash;
        }
        let spellings: Vec<String> = self.0.iter().map(Spelling::to_string).collect();
        format!("{hash}{SEPARATOR}{}", spellings.join(","))
    }

    /// Appends the value of the group column at `place` to a group's name.
    pub(crate) fn append(&self, group: &mut String, place: usize, kind: Type, text: Option<&str>) {
        let text = text.map(|text| shortest(kind, text));
        key::append(group, place, text);
        let (Some(text), Some(spelling)) = (text, self.0.get(place)) else { return };
        match (kind, spelling) {
            (Type::Numeric, Spelling::Scale(scale)) => pad_fraction(group, text, (*scale).into()),
            (Type::Char, Spelling::Width(width)) => {
                let missing = (*width as usize).saturating_sub(text.chars().count());
                group.extend(std::iter::repeat_n(' ', missing));
            }
            _ => {}
        }
    }
}

impl Spelling {
    fn of(column: &Column) -> Spelling {
        let modifier = || Some(column.type_name.split_once('(')?.1.split_once(')')?.0);
        match (Type::of(column.type_oid), modifier()) {
            (Some(Type::Numeric), Some(modifier)) => {
                // A scale of 0 or less prints no point.
                let scale = modifier.split_once(',').and_then(|(_, scale)| scale.trim().parse().ok());
                scale.filter(|scale| *scale > 0).map_or(Spelling::Shortest, Spelling::Scale)
            }
            (Some(Type::Char), Some(width)) => {
                width.trim().parse().map_or(Spelling::Shortest, Spelling::Width)
            }
            _ => Spelling::Shortest,
        }
    }

    /// Reads what it displays.
    fn read(text: &str) -> Option<Spelling> {
        match text.split_at_checked(1)? {
            ("-", "") => Some(Spelling::Shortest),
            ("n", scale) => scale.parse().ok().map(Spelling::Scale),
            ("c", width) => width.parse().ok().map(Spelling::Width),
            _ => None,
        }
    }
}

impl fmt::Display for Spelling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Spelling::Shortest => f.write_str("-"),
            Spelling::Scale(scale) => write!(f, "n{scale}"),
            Spelling::Width(width) => write!(f, "c{width}"),
        }
    }
}

/// The one text that stands for all equal values of the type.
fn shortest(kind: Type, text: &str) -> &str {
    match kind {
        Type::Numeric => trim_scale(text),
        Type::Char => text.trim_end_matches(' '),
        _ => text,
    }
}

/// Adds zeros to the number at the end of `group`, whose text is `number`, until it has `scale` digits after the point.
fn pad_fraction(group: &mut String, number: &str, scale: usize) {
    if !number.ends_with(|last: char| last.is_ascii_digit()) {
        // NaN or an infinity.
        return;
    }
    let digits = match number.split_once('.') {
        Some((_, fraction)) => fraction.len(),
        None => {
            group.push('.');
            0
        }
    };
    group.extend(std::iter::repeat_n('0', scale.saturating_sub(digits)));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(type_oid: u32, type_name: &str) -> Column {
        Column {
            name: "c".into(),
            type_oid,
            type_name: type_name.into(),
            key: None,
            collation: None,
            number: None,
            recorded: None,
        }
    }

    fn written(type_oid: u32, type_name: &str, text: &str) -> String {
        let column = column(type_oid, type_name);
        let mut group = String::new();
        let kind = Type::of(type_oid).unwrap();
        Form::of([&column].into_iter()).append(&mut group, 0, kind, Some(text));
        group
    }

    #[test]
    fn values_as_their_type_prints_them() {
        for (type_name, text, expected) in [
            ("numeric(10,2)", "1.50", "1.50"),
            ("numeric(10,2)", "100.00", "100.00"),
            ("numeric(10,2)", "0.00", "0.00"),
            ("numeric(10,2)", "-0.05", "-0.05"),
            ("numeric(10,2)", "NaN", "NaN"),
            // Rows of an older version of the table are written in the store's form.
            ("numeric(10,2)", "1.5", "1.50"),
            ("numeric(10,2)", "1.555", "1.555"),
            ("numeric(2,5)", "0.00010", "0.00010"),
            ("numeric(10,0)", "100", "100"),
            ("numeric(3,-2)", "12300", "12300"),
            ("numeric(5)", "100", "100"),
            ("numeric", "1.50", "1.5"),
            ("numeric", "100.00", "100"),
            ("numeric", "Infinity", "Infinity"),
        ] {
            assert_eq!(written(1700, type_name, text), expected, "{type_name} {text}");
        }
        for (type_name, text, expected) in [
            ("character(4)", "ab  ", "ab  "),
            ("character(4)", "ab", "ab  "),
            ("character(4)", "", "    "),
            ("character(4)", "日本", "日本  "),
            ("character(4)", "abcdef", "abcdef"),
            ("character(4)", "a:", "a\\:  "),
            ("character", "ab  ", "ab"),
        ] {
            assert_eq!(written(1042, type_name, text), expected, "{type_name} {text}");
        }
        assert_eq!(written(1043, "character varying(4)", "a "), "a ");
    }

    #[test]
    fn a_form_is_read_back_from_the_definition() {
        let columns = [column(20, "bigint"), column(1700, "numeric(10,2)"), column(1042, "character(4)")];
        let form = Form::of(columns.iter());
        let stamped = form.stamp("abc".into());
        assert_eq!(stamped, "abc:-,n2,c4");
        assert_eq!(Form::read(&stamped), Some(form));
        assert_eq!(Form::of(columns[..1].iter()).stamp("abc".into()), "abc");
        assert_eq!(Form::read("abc"), Some(Form::default()));
        for unknown in ["abc:", "abc:x2", "abc:n", "abc:n2,", "abc:-1", "abc:é"] {
            assert_eq!(Form::read(unknown), None, "{unknown}");
        }
    }
}
