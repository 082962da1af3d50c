//! The text of a composite key, as stores name a group or a document: values as Postgres prints them, joined by
//! `:`; `\` and `:` inside a value are escaped by `\`, and NULL is `\N`.

/// Appends the value at `place`, counted from 0.
pub fn append(key: &mut String, place: usize, value: Option<&str>) {
    if place > 0 {
        key.push(':');
    }
    let Some(mut rest) = value else { return key.push_str("\\N") };
    while let Some(at) = rest.find(['\\', ':']) {
        let (before, special) = rest.split_at(at);
        key.push_str(before);
        key.push('\\');
        // Both are one byte long.
        key.push_str(&special[..1]);
        rest = &special[1..];
    }
    key.push_str(rest);
}

/// Joins values.
pub fn join<'a>(values: impl IntoIterator<Item = Option<&'a str>>) -> String {
    let mut key = String::new();
    for (place, value) in values.into_iter().enumerate() {
        append(&mut key, place, value);
    }
    key
}

/// Takes a key of `count` values apart; `None` for what [`join`] cannot have made.
pub fn split(key: &str, count: usize) -> Option<Vec<Option<String>>> {
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
