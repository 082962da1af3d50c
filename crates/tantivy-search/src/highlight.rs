//! The words of a query marked in a text, and the piece of a long text that has the most of them.

use std::collections::HashSet;
use std::ops::Range;

use tantivy::tokenizer::TextAnalyzer;

/// A word in a text.
struct Word {
    at: Range<usize>,
    wanted: bool,
}

/// How texts are shown.
pub(crate) struct Marks<'a> {
    pub(crate) before: &'a str,
    pub(crate) after: &'a str,
    /// Stands for text that is left out.
    pub(crate) cut: &'a str,
}

/// The text with the wanted words between the marks, if `mark`; only some `crop` words of it, if given.
pub(crate) fn formatted(
    text: &str,
    wanted: &HashSet<String>,
    analyzer: &mut TextAnalyzer,
    marks: &Marks<'_>,
    mark: bool,
    crop: Option<usize>,
) -> String {
    let mut words = Vec::new();
    analyzer.token_stream(text).process(&mut |token| {
        let at = token.offset_from..token.offset_to;
        words.push(Word { at, wanted: wanted.contains(&token.text) });
    });
    let shown = crop.map_or(0..text.len(), |length| best_piece(text, &words, length));
    let mut out = String::with_capacity(shown.len() + 32);
    if shown.start > 0 {
        out.push_str(marks.cut);
    }
    let mut copied = shown.start;
    let inside =
        |word: &&Word| mark && word.wanted && word.at.start >= shown.start && word.at.end <= shown.end;
    for Word { at, .. } in words.iter().filter(inside) {
        out.push_str(&text[copied..at.start]);
        out.push_str(marks.before);
        out.push_str(&text[at.clone()]);
        out.push_str(marks.after);
        copied = at.end;
    }
    out.push_str(&text[copied..shown.end]);
    if shown.end < text.len() {
        out.push_str(marks.cut);
    }
    out
}

/// The run of `length` words with the most wanted ones, the first of equals; whole texts stay whole.
fn best_piece(text: &str, words: &[Word], length: usize) -> Range<usize> {
    if length == 0 || words.len() <= length {
        return 0..text.len();
    }
    let mut count = words[..length].iter().filter(|word| word.wanted).count();
    let (mut best, mut best_count) = (0, count);
    for start in 1..=words.len() - length {
        count += usize::from(words[start + length - 1].wanted);
        count -= usize::from(words[start - 1].wanted);
        if count > best_count {
            (best, best_count) = (start, count);
        }
    }
    let start = if best == 0 { 0 } else { words[best].at.start };
    let end = if best + length == words.len() { text.len() } else { words[best + length - 1].at.end };
    start..end
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tantivy::tokenizer::TokenizerManager;

    fn shown(text: &str, wanted: &[&str], crop: Option<usize>) -> String {
        let mut analyzer = TokenizerManager::default().get(crate::index::WORDS).unwrap();
        let wanted = wanted.iter().map(|word| word.to_string()).collect();
        formatted(text, &wanted, &mut analyzer, &Marks { before: "<", after: ">", cut: "…" }, true, crop)
    }

    #[test]
    fn marks_words_whatever_their_case_and_leaves_the_rest() {
        assert_eq!(shown("Größe, GRÖSSE & größe!", &["größe"], None), "<Größe>, GRÖSSE & <größe>!");
        assert_eq!(shown("no match", &["x"], None), "no match");
        assert_eq!(shown("", &["x"], None), "");
    }

    #[test]
    fn crops_to_the_piece_with_the_most_hits() {
        let text = "one two three four, five six seven eight nine ten.";
        assert_eq!(shown(text, &["six", "eight"], Some(3)), "…<six> seven <eight>…");
        assert_eq!(shown(text, &["one"], Some(2)), "<one> two…");
        assert_eq!(shown(text, &["ten"], Some(2)), "…nine <ten>.");
        assert_eq!(shown(text, &[], Some(99)), text);
    }

    proptest! {
        #[test]
        fn without_the_marks_it_is_the_text(text in "\\PC{0,60}", length in 0usize..20) {
            let wanted: Vec<&str> = text.split_whitespace().take(2).collect();
            let plain = shown(&text.replace(['<', '>', '…'], ""), &wanted, None).replace(['<', '>'], "");
            prop_assert_eq!(plain, text.replace(['<', '>', '…'], ""));
            shown(&text, &wanted, Some(length));
        }
    }
}
