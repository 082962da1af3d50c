//! The grammar, from Meilisearch's reference:
//!
//! ```text
//! or        = and ("OR" and)*
//! and       = not ("AND" not)*
//! not       = "NOT" not | "(" or ")" | condition
//! condition = attribute ("=" | "!=" | ">" | ">=" | "<" | "<=") value
//!           | attribute value "TO" value
//!           | attribute ["NOT"] "IN" "[" [value ("," value)* [","]] "]"
//!           | attribute ["NOT"] "EXISTS" | attribute "IS" ["NOT"] ("NULL" | "EMPTY")
//! value     = a word, or anything between ' or between " with \ before a quote or a \
//! ```

use serde_json::Value;

use super::{Filter, Test};

/// Longest filter, bytes.
const MAX_BYTES: usize = 64 << 10;
/// Deepest nesting of parentheses and NOT.
const MAX_DEPTH: usize = 100;
/// Most nested arrays and expressions of a filter in JSON form.
const MAX_ENTRIES: usize = 1_000;

/// Reads an expression. The error says what was expected where.
pub(super) fn parse(text: &str) -> Result<Filter, String> {
    if text.len() > MAX_BYTES {
        return Err(format!("The filter is {} bytes long; at most {MAX_BYTES} are possible.", text.len()));
    }
    let tokens = tokens(text)?;
    let mut parser = Parser { tokens: &tokens, at: 0, depth: 0 };
    let filter = parser.any()?;
    match parser.peek() {
        None => Ok(filter),
        Some(_) => Err(parser.expected("`AND`, `OR` or the end")),
    }
}

/// Reads a filter of a JSON body: an expression, or an array of them, all of which must hold, where an array in
/// the array is a choice. Nothing to filter by is `None`.
pub(crate) fn parse_json(json: &Value) -> Result<Option<Filter>, String> {
    const SHAPE: &str = "The filter must be a string, or an array of strings and of arrays of strings.";
    let one = |text: &str| if text.trim().is_empty() { Ok(None) } else { parse(text).map(Some) };
    let choice = |entry: &Value| -> Result<Option<Filter>, String> {
        match entry {
            Value::String(text) => one(text),
            Value::Array(entries) => {
                let filters = entries.iter().map(|entry| one(entry.as_str().ok_or(SHAPE)?));
                let filters: Vec<Filter> =
                    filters.filter_map(Result::transpose).collect::<Result<_, String>>()?;
                Ok((!filters.is_empty()).then_some(Filter::Any(filters)))
            }
            _ => Err(SHAPE.to_owned()),
        }
    };
    match json {
        Value::Null => Ok(None),
        Value::String(text) => one(text),
        Value::Array(entries) => {
            let inner = |entry: &Value| entry.as_array().map_or(1, Vec::len);
            if entries.iter().map(inner).sum::<usize>() > MAX_ENTRIES {
                return Err(format!("The filter has more than {MAX_ENTRIES} expressions."));
            }
            let filters: Vec<Filter> =
                entries.iter().map(choice).filter_map(Result::transpose).collect::<Result<_, String>>()?;
            Ok((!filters.is_empty()).then_some(Filter::All(filters)))
        }
        _ => Err(SHAPE.to_owned()),
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Token {
    /// A bare word, which may be a keyword.
    Word(String),
    Quoted(String),
    Sign(&'static str),
}

/// The tokens, each with the place where it begins.
fn tokens(text: &str) -> Result<Vec<(usize, Token)>, String> {
    const SIGNS: [&str; 11] = ["!=", ">=", "<=", "=", ">", "<", "(", ")", "[", "]", ","];
    let mut tokens = Vec::new();
    let mut at = 0;
    while let Some(c) = text[at..].chars().next() {
        let rest = &text[at..];
        if c.is_whitespace() {
            at += c.len_utf8();
        } else if let Some(sign) = SIGNS.iter().find(|sign| rest.starts_with(**sign)) {
            tokens.push((at, Token::Sign(sign)));
            at += sign.len();
        } else if matches!(c, '"' | '\'') {
            let (content, length) = quoted(rest, c).ok_or_else(|| {
                format!("Expected a closing `{c}` for the one at {}: `{rest}`.", place(text, at))
            })?;
            tokens.push((at, Token::Quoted(content)));
            at += length;
        } else {
            let end = rest.find(|c: char| !word_char(c)).unwrap_or(rest.len());
            if end == 0 {
                return Err(format!(
                    "Found unexpected `{c}` at {}; quote values that have it.",
                    place(text, at)
                ));
            }
            tokens.push((at, Token::Word(rest[..end].to_owned())));
            at += end;
        }
    }
    Ok(tokens)
}

fn word_char(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '_' | '-' | '/' | '.' | ':' | '+' | '@')
}

/// The content of a quoted value at the front of `text`, and its length in `text`.
fn quoted(text: &str, quote: char) -> Option<(String, usize)> {
    let mut content = String::new();
    let mut chars = text.char_indices().skip(1);
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => match chars.next()? {
                (_, escaped) if escaped == quote || escaped == '\\' => content.push(escaped),
                (_, other) => content.extend(['\\', other]),
            },
            c if c == quote => return Some((content, at + 1)),
            c => content.push(c),
        }
    }
    None
}

/// A place for people, counted in characters from 1.
fn place(text: &str, at: usize) -> usize {
    text[..at].chars().count() + 1
}

struct Parser<'t> {
    tokens: &'t [(usize, Token)],
    at: usize,
    depth: usize,
}

impl Parser<'_> {
    fn any(&mut self) -> Result<Filter, String> {
        let mut choices = vec![self.all()?];
        while self.keyword("OR") {
            choices.push(self.all()?);
        }
        Ok(if choices.len() == 1 { choices.remove(0) } else { Filter::Any(choices) })
    }

    fn all(&mut self) -> Result<Filter, String> {
        let mut parts = vec![self.not()?];
        while self.keyword("AND") {
            parts.push(self.not()?);
        }
        Ok(if parts.len() == 1 { parts.remove(0) } else { Filter::All(parts) })
    }

    fn not(&mut self) -> Result<Filter, String> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(format!("The filter is nested more than {MAX_DEPTH} times."));
        }
        let filter = if self.keyword("NOT") {
            Filter::Not(Box::new(self.not()?))
        } else if self.sign("(") {
            let inner = self.any()?;
            if !self.sign(")") {
                return Err(self.expected("a closing `)`"));
            }
            inner
        } else {
            self.condition()?
        };
        self.depth -= 1;
        Ok(filter)
    }

    fn condition(&mut self) -> Result<Filter, String> {
        let attribute = self.value("an attribute")?;
        let negated = self.keyword("NOT");
        let test = if self.keyword("EXISTS") {
            Test::Exists
        } else if self.keyword("IN") {
            Test::OneOf(self.list()?)
        } else if negated {
            return Err(self.expected("`IN` or `EXISTS` after `NOT`"));
        } else {
            return self.comparison(attribute);
        };
        let is = Filter::Is(attribute, test);
        Ok(if negated { Filter::Not(Box::new(is)) } else { is })
    }

    fn comparison(&mut self, attribute: String) -> Result<Filter, String> {
        if self.keyword("IS") {
            let negated = self.keyword("NOT");
            let test = match () {
                () if self.keyword("NULL") => Test::Null,
                () if self.keyword("EMPTY") => Test::Empty,
                () => return Err(self.expected("`NULL` or `EMPTY`")),
            };
            let is = Filter::Is(attribute, test);
            return Ok(if negated { Filter::Not(Box::new(is)) } else { is });
        }
        const COMPARISONS: [&str; 6] = ["=", "!=", ">=", "<=", ">", "<"];
        let Some(sign) = COMPARISONS.into_iter().find(|sign| self.sign(sign)) else {
            return self.to(attribute);
        };
        let value = self.value("a value")?;
        let test = match sign {
            "=" | "!=" => Test::OneOf(vec![value]),
            ">" | ">=" => Test::Range { low: Some((value, sign == ">=")), high: None },
            _ => Test::Range { low: None, high: Some((value, sign == "<=")) },
        };
        let is = Filter::Is(attribute, test);
        Ok(if sign == "!=" { Filter::Not(Box::new(is)) } else { is })
    }

    fn to(&mut self, attribute: String) -> Result<Filter, String> {
        const OPERATORS: &str =
            "one of `=`, `!=`, `>`, `>=`, `<`, `<=`, `IN`, `NOT IN`, `TO`, `EXISTS`, `IS NULL`, `IS EMPTY`";
        let Some(low) = self.plain_value() else { return Err(self.expected(OPERATORS)) };
        if !self.keyword("TO") {
            return Err(self.expected(OPERATORS));
        }
        let high = self.value("a value")?;
        Ok(Filter::Is(attribute, Test::Range { low: Some((low, true)), high: Some((high, true)) }))
    }

    fn list(&mut self) -> Result<Vec<String>, String> {
        if !self.sign("[") {
            return Err(self.expected("`[`"));
        }
        let mut values = Vec::new();
        while !self.sign("]") {
            if !values.is_empty() {
                if !self.sign(",") {
                    return Err(self.expected("`,` or `]`"));
                }
                if self.sign("]") {
                    break;
                }
            }
            values.push(self.value("a value or `]`")?);
        }
        Ok(values)
    }

    fn value(&mut self, what: &str) -> Result<String, String> {
        self.plain_value().ok_or_else(|| self.expected(what))
    }

    /// A quoted value, or a word that is no keyword.
    fn plain_value(&mut self) -> Option<String> {
        const KEYWORDS: [&str; 9] = ["AND", "OR", "NOT", "IN", "TO", "EXISTS", "IS", "NULL", "EMPTY"];
        let value = match self.peek()? {
            Token::Quoted(value) => value.clone(),
            Token::Word(word) if !KEYWORDS.contains(&word.as_str()) => word.clone(),
            _ => return None,
        };
        self.at += 1;
        Some(value)
    }

    fn keyword(&mut self, keyword: &str) -> bool {
        self.take(|token| matches!(token, Token::Word(word) if word == keyword))
    }

    fn sign(&mut self, sign: &str) -> bool {
        self.take(|token| matches!(token, Token::Sign(found) if *found == sign))
    }

    fn take(&mut self, wanted: impl Fn(&Token) -> bool) -> bool {
        let taken = self.peek().is_some_and(wanted);
        self.at += usize::from(taken);
        taken
    }

    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at).map(|(_, token)| token)
    }

    fn expected(&self, what: &str) -> String {
        match self.tokens.get(self.at) {
            None => format!("Was expecting {what}, but the filter ends."),
            Some((at, token)) => {
                let found = match token {
                    Token::Word(text) | Token::Quoted(text) => text.as_str(),
                    Token::Sign(sign) => sign,
                };
                format!("Was expecting {what}, but found `{found}` after {at} bytes.")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn shown(filter: &Filter) -> String {
        let list = |filters: &[Filter]| filters.iter().map(shown).collect::<Vec<_>>().join(" ");
        match filter {
            Filter::All(filters) => format!("(and {})", list(filters)),
            Filter::Any(filters) => format!("(or {})", list(filters)),
            Filter::Not(filter) => format!("(not {})", shown(filter)),
            Filter::Is(attribute, Test::OneOf(values)) => format!("{attribute}={values:?}"),
            Filter::Is(attribute, Test::Range { low, high }) => {
                let bound = |bound: &Option<(String, bool)>, open: &str, closed: &str| match bound {
                    None => "..".to_owned(),
                    Some((value, included)) => format!("{value}{}", if *included { closed } else { open }),
                };
                format!("{attribute}:{}{}", bound(low, "<", "<="), bound(high, ">", ">="))
            }
            Filter::Is(attribute, test) => format!("{attribute}:{test:?}"),
        }
    }

    #[test]
    fn reads_the_grammar() {
        for (text, tree) in [
            ("a = 1", r#"a=["1"]"#),
            ("a=1", r#"a=["1"]"#),
            ("a != 'x y'", r#"(not a=["x y"])"#),
            ("a = 1 OR b = 2 AND NOT c = 3", r#"(or a=["1"] (and b=["2"] (not c=["3"])))"#),
            ("(a = 1 OR b = 2) AND c = 3", r#"(and (or a=["1"] b=["2"]) c=["3"])"#),
            ("a IN [1, 'two', \"th\\\"ree\",]", r#"a=["1", "two", "th\"ree"]"#),
            ("a NOT IN []", "(not a=[])"),
            ("a >= 1 AND a < 2.5", "(and a:1<=.. a:..2.5>)"),
            ("a -1 TO 3", "a:-1<=3>="),
            ("sent > 2025-01-19T12:34:56+02:00", "sent:2025-01-19T12:34:56+02:00<.."),
            ("a EXISTS AND b NOT EXISTS", "(and a:Exists (not b:Exists))"),
            ("a IS NULL OR a IS NOT EMPTY", "(or a:Null (not a:Empty))"),
            ("'odd name' = 'AND'", r#"odd name=["AND"]"#),
            ("NOT NOT a = ''", r#"(not (not a=[""]))"#),
            ("a = 'back\\\\slash \\n'", r#"a=["back\\slash \\n"]"#),
            ("straße = größe", r#"straße=["größe"]"#),
        ] {
            assert_eq!(shown(&parse(text).expect(text)), tree, "{text}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        for (text, part) in [
            ("", "an attribute"),
            ("a", "one of `=`"),
            ("a = ", "a value, but the filter ends"),
            ("a = 1 b = 2", "`AND`, `OR` or the end, but found `b` after 6 bytes"),
            ("(a = 1", "a closing `)`"),
            ("a = 'x", "a closing `'`"),
            ("a IN 1", "`[`"),
            ("a IN [1 2]", "`,` or `]`"),
            ("a IS 5", "`NULL` or `EMPTY`"),
            ("a = AND", "a value"),
            ("a = {1}", "unexpected `{` at 5"),
            ("a NOT = 1", "`IN` or `EXISTS`"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(part), "{text}: {error}");
        }
        assert!(parse(&"(".repeat(5_000)).unwrap_err().contains("nested"));
        assert!(parse(&"x".repeat(MAX_BYTES + 1)).unwrap_err().contains("bytes long"));
    }

    #[test]
    fn arrays_are_conjunctions_of_choices() {
        let read = |json: &str| parse_json(&serde_json::from_str(json).unwrap());
        let tree = |json| read(json).unwrap().as_ref().map(shown);
        assert_eq!(tree("null"), None);
        assert_eq!(tree(r#""""#), None);
        assert_eq!(tree("[]"), None);
        assert_eq!(tree("[[]]"), None);
        let both = r#"["a = 1", ["b = 2", "c = 3"]]"#;
        assert_eq!(tree(both).unwrap(), r#"(and a=["1"] (or b=["2"] c=["3"]))"#);
        for json in ["1", "[1]", "[[[]]]", r#"{"a":1}"#] {
            assert!(read(json).unwrap_err().contains("must be a string"), "{json}");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(text in "[a-z=!<>()\\[\\],'\"\\\\ ANDORTIéß0-9]{0,60}") {
            let _ = parse(&text);
        }
    }
}
