//! LIKE: `%` is any text, `_` one character, the escape character takes the next one literally.

/// A LIKE pattern, ready to match. The whole value must match; characters are Unicode's, as in a database
/// whose encoding is UTF-8.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Pattern(Vec<Piece>);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Piece {
    AnyText,
    AnyCharacter,
    Character(char),
}

impl Pattern {
    /// `escape` is the escape character, if there is one. `None` for a pattern that ends with it, which Postgres
    /// refuses too, though only when it meets a row that gets that far.
    pub(crate) fn new(pattern: &str, escape: Option<char>) -> Option<Pattern> {
        let mut pieces = Vec::new();
        let mut characters = pattern.chars();
        while let Some(character) = characters.next() {
            pieces.push(match character {
                _ if Some(character) == escape => Piece::Character(characters.next()?),
                '%' => Piece::AnyText,
                '_' => Piece::AnyCharacter,
                _ => Piece::Character(character),
            });
        }
        Some(Pattern(pieces))
    }

    /// Whether all of `text` matches. On a mismatch only the last `%` takes one more character: what an earlier
    /// one could take, the last could as well. So time is at most pattern times text, and there is no recursion.
    pub(crate) fn matches(&self, text: &str) -> bool {
        let (mut place, mut rest) = (0, text);
        let mut retry: Option<(usize, &str)> = None;
        loop {
            match (self.0.get(place), rest.chars().next()) {
                (Some(Piece::AnyText), _) => {
                    place += 1;
                    retry = Some((place, rest));
                    continue;
                }
                (Some(Piece::AnyCharacter), Some(found)) => {
                    (place, rest) = (place + 1, &rest[found.len_utf8()..]);
                    continue;
                }
                (Some(Piece::Character(wanted)), Some(found)) if *wanted == found => {
                    (place, rest) = (place + 1, &rest[found.len_utf8()..]);
                    continue;
                }
                (None, None) => return true,
                _ => {}
            }
            let Some((after, from)) = retry else { return false };
            let mut longer = from.chars();
            if longer.next().is_none() {
                return false;
            }
            (place, rest) = (after, longer.as_str());
            retry = Some((after, rest));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_whole_values() {
        let cases = [
            ("abc", "abc", true),
            ("abc", "ab", false),
            ("ab", "abc", false),
            ("a%", "a", true),
            ("%", "", true),
            ("_", "", false),
            ("_", "é", true),
            ("%b%d", "abcbdxd", true),
            ("%b_d", "abcbd", false),
            ("a%a", "a", false),
            (r"100\%", "100%", true),
            (r"100\%", "1000", false),
            (r"a\_b", "axb", false),
            (r"\\", r"\", true),
            ("%aab", "aaaab", true),
            ("%é_", "aéé", true),
        ];
        for (pattern, text, expected) in cases {
            let compiled = Pattern::new(pattern, Some('\\')).unwrap();
            assert_eq!(compiled.matches(text), expected, "{text} LIKE {pattern}");
        }
    }

    #[test]
    fn escapes() {
        assert!(Pattern::new("50!%", Some('!')).unwrap().matches("50%"));
        assert!(Pattern::new("%%", Some('%')).unwrap().matches("%"));
        assert!(Pattern::new(r"a\%", None).unwrap().matches(r"a\bc"));
        assert_eq!(Pattern::new(r"abc\", Some('\\')), None);
    }
}
