//! The name of a group or a document, as the Contract has it: values joined by `:`, `\` and `:` inside a value
//! escaped by `\`, and NULL as `\N`. Written anew here, so that a mistake of a sink's shows.

/// Joins values, as Postgres prints them.
pub(crate) fn join<'a>(values: impl IntoIterator<Item = Option<&'a str>>) -> String {
    let part = |value: Option<&str>| match value {
        Some(value) => value.replace('\\', "\\\\").replace(':', "\\:"),
        None => "\\N".to_owned(),
    };
    values.into_iter().map(part).collect::<Vec<_>>().join(":")
}

/// Takes a key of `count` values apart; `None` for what [`join`] cannot have made.
pub(crate) fn split(key: &str, count: usize) -> Option<Vec<Option<String>>> {
    let mut values = Vec::with_capacity(count);
    let mut value = Some(String::new());
    let mut chars = key.chars();
    while let Some(c) = chars.next() {
        match c {
            ':' => values.push(value.replace(String::new())),
            '\\' => match chars.next()? {
                'N' if value.as_deref() == Some("") => value = None,
                escaped @ ('\\' | ':') => value.as_mut()?.push(escaped),
                _ => return None,
            },
            c => value.as_mut()?.push(c),
        }
    }
    values.push(value);
    (values.len() == count).then_some(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_the_contracts_and_come_apart_again() {
        let cases: [(&[Option<&str>], &str); 7] = [
            (&[Some("42")], "42"),
            (&[Some("")], ""),
            (&[None], r"\N"),
            (&[Some(r"\N")], r"\\N"),
            (&[Some("a:b"), Some("c")], r"a\:b:c"),
            (&[Some("a"), Some("b:c")], r"a:b\:c"),
            (&[Some(r"x\"), None, Some("é")], r"x\\:\N:é"),
        ];
        for (values, key) in cases {
            assert_eq!(join(values.iter().copied()), key);
            let owned: Vec<_> = values.iter().map(|value| value.map(str::to_owned)).collect();
            assert_eq!(split(key, values.len()), Some(owned), "{key}");
        }
        for (key, count) in [("a:b", 1), ("a", 2), (r"\x", 1), (r"a\N", 1), (r"\Na", 1), ("\\", 1)] {
            assert_eq!(split(key, count), None, "{key}");
        }
    }
}
