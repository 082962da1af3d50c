//! The name of a group: a hash field made of the values of its columns.

use super::column_type::Type;
use super::decimal::trim_scale;

/// The hash field of a group: its values joined by `:`, with `\` and `:` inside a value escaped by `\`, and NULL
/// as `\N`. The values are texts as [`Bound::select_sql`](super::Bound::select_sql) gives them.
pub fn group_field<'a>(values: impl Iterator<Item = Option<&'a str>>) -> String {
    let mut field = String::new();
    for (place, value) in values.enumerate() {
        append(&mut field, place, value);
    }
    field
}

/// Appends the value at `place` to a field.
pub(crate) fn append(field: &mut String, place: usize, value: Option<&str>) {
    if place > 0 {
        field.push(':');
    }
    let Some(mut rest) = value else { return field.push_str("\\N") };
    while let Some(at) = rest.find(['\\', ':']) {
        let (before, special) = rest.split_at(at);
        field.push_str(before);
        field.push('\\');
        // Both are one byte long.
        field.push_str(&special[..1]);
        rest = &special[1..];
    }
    field.push_str(rest);
}

/// The one text that stands for all equal values of the type.
pub(crate) fn normalised(kind: Type, text: &str) -> &str {
    match kind {
        Type::Numeric => trim_scale(text),
        Type::Char => text.trim_end_matches(' '),
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_unambiguous() {
        let cases: [(&[Option<&str>], &str); 8] = [
            (&[], ""),
            (&[Some("42")], "42"),
            (&[Some("")], ""),
            (&[None], r"\N"),
            (&[Some(r"\N")], r"\\N"),
            (&[Some("a:b"), Some("c")], r"a\:b:c"),
            (&[Some("a"), Some("b:c")], r"a:b\:c"),
            (&[Some(r"x\"), None, Some("é")], r"x\\:\N:é"),
        ];
        for (values, field) in cases {
            assert_eq!(group_field(values.iter().copied()), field);
        }
    }
}
