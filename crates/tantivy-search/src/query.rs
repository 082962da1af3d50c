//! A search: what `q` and a filter select, in which order, and how much of it.

use std::collections::HashSet;

use tantivy::collector::sort_key::SortByString;
use tantivy::collector::{Count, TopDocs};
use tantivy::query::{BooleanQuery, Occur, PhraseQuery, Query, TermQuery};
use tantivy::schema::{Field, IndexRecordOption};
use tantivy::tokenizer::TextAnalyzer;
use tantivy::{DocAddress, Order, Searcher, Term};

use crate::definition::Role;
use crate::filter::Selection;
use crate::index::{ID, Layout, WORDS};

/// What is searched for.
///
/// In Meilisearch's manner: `"quoted words"` must follow each other, `-word` must be absent. Unlike there, words
/// are not completed or corrected. Ranking is BM25 over all text columns: the more of the words a document has,
/// the rarer they are and the shorter its text, the higher it stands.
#[derive(Debug, Default)]
pub(crate) struct Words {
    optional: Vec<String>,
    phrases: Vec<Vec<String>>,
    excluded: Vec<Vec<String>>,
    /// There is text, though perhaps no word in it.
    text: bool,
}

impl Words {
    /// Takes `q` apart.
    pub(crate) fn read(q: &str, analyzer: &mut TextAnalyzer) -> Words {
        let mut words = Words { text: !q.trim().is_empty(), ..Words::default() };
        // Every second piece stands between quotes; one that is not closed reaches to the end.
        let mut excluded = false;
        for (place, piece) in q.split('"').enumerate() {
            if place % 2 == 1 {
                words.take(tokens(analyzer, piece), true, excluded);
                continue;
            }
            excluded = piece.ends_with('-') && !piece.trim_end_matches('-').ends_with(char::is_alphanumeric);
            for word in piece.split_whitespace() {
                match word.strip_prefix('-') {
                    Some(word) => words.take(tokens(analyzer, word), true, true),
                    None => words.take(tokens(analyzer, word), false, false),
                }
            }
        }
        words
    }

    fn take(&mut self, tokens: Vec<String>, together: bool, excluded: bool) {
        match (tokens.is_empty(), together, excluded) {
            (true, ..) => {}
            (_, _, true) => self.excluded.push(tokens),
            (_, true, _) => self.phrases.push(tokens),
            _ => self.optional.extend(tokens),
        }
    }

    /// The words that a hit may have, for highlighting.
    pub(crate) fn wanted(&self) -> HashSet<String> {
        self.optional.iter().chain(self.phrases.iter().flatten()).cloned().collect()
    }

    fn ranks(&self) -> bool {
        !self.optional.is_empty() || !self.phrases.is_empty()
    }

    /// What scores.
    fn ranking(&self, fields: &[Field], all: bool) -> Vec<(Occur, Box<dyn Query>)> {
        let words = self.optional.iter().map(|word| anywhere(fields, std::slice::from_ref(word)));
        let phrases = self.phrases.iter().map(|phrase| (Occur::Must, anywhere(fields, phrase)));
        let mut clauses: Vec<(Occur, Box<dyn Query>)> = if all || self.optional.is_empty() {
            words.map(|word| (Occur::Must, word)).collect()
        } else {
            vec![(Occur::Must, Box::new(BooleanQuery::union(words.collect())))]
        };
        clauses.extend(phrases);
        clauses
    }

    /// What only selects.
    fn selection(&self, fields: &[Field]) -> Selection {
        if self.text && !self.ranks() && self.excluded.is_empty() {
            return Selection::Nothing;
        }
        let absent = |phrase: &Vec<String>| Selection::Matches(anywhere(fields, phrase).into()).not();
        Selection::All(self.excluded.iter().map(absent).collect())
    }
}

pub(crate) fn tokens(analyzer: &mut TextAnalyzer, text: &str) -> Vec<String> {
    let mut tokens = Vec::new();
    analyzer.token_stream(text).process(&mut |token| tokens.push(token.text.clone()));
    tokens
}

/// The words, one after the other, in any of the fields.
fn anywhere(fields: &[Field], words: &[String]) -> Box<dyn Query> {
    let of = |field: &Field| -> Box<dyn Query> {
        let mut terms: Vec<Term> = words.iter().map(|word| Term::from_field_text(*field, word)).collect();
        match terms.len() {
            1 => Box::new(TermQuery::new(terms.remove(0), IndexRecordOption::WithFreqs)),
            _ => Box::new(PhraseQuery::new(terms)),
        }
    };
    Box::new(BooleanQuery::union(fields.iter().map(of).collect()))
}

/// What to find.
pub(crate) struct Search {
    pub(crate) words: Words,
    /// Whether every word must be there, not only the more the better.
    pub(crate) all_words: bool,
    pub(crate) filter: Option<Selection>,
    /// At most two columns, as places among the definition's roles.
    pub(crate) sort: Vec<(usize, Order)>,
    pub(crate) offset: usize,
    pub(crate) limit: usize,
}

impl Search {
    /// The hits, and how many there are without offset and limit. In the order of `sort`; else of their score;
    /// else, when there are no words, of their ids.
    pub(crate) fn run(
        self,
        searcher: &Searcher,
        layout: &Layout,
    ) -> tantivy::Result<(Vec<DocAddress>, usize)> {
        let text = layout.definition.roles().zip(&layout.fields);
        let text: Vec<Field> =
            text.filter(|((role, _), _)| *role == Role::Text).map(|(_, field)| *field).collect();
        let mut selection = vec![self.words.selection(&text)];
        selection.extend(self.filter);
        let mut clauses = self.words.ranking(&text, self.all_words);
        clauses.push((Occur::Must, Box::new(Selection::All(selection))));
        let query = BooleanQuery::new(clauses);
        let Some(limit) = std::num::NonZeroUsize::new(self.limit) else {
            return Ok((Vec::new(), searcher.search(&query, &Count)?));
        };
        let top = TopDocs::with_limit(limit.get()).and_offset(self.offset);
        let by = |place: usize, order| (SortByString::for_field(Layout::name(place)), order);
        let by_id = (SortByString::for_field(ID), Order::Asc);
        fn places<K>((top, count): (Vec<(K, DocAddress)>, usize)) -> (Vec<DocAddress>, usize) {
            (top.into_iter().map(|(_, at)| at).collect(), count)
        }
        Ok(match self.sort[..] {
            [] if self.words.ranks() => places(searcher.search(&query, &(top.order_by_score(), Count))?),
            [] => places(searcher.search(&query, &(top.order_by(by_id), Count))?),
            [(place, order)] => {
                places(searcher.search(&query, &(top.order_by((by(place, order), by_id)), Count))?)
            }
            [(first, order), (second, then), ..] => {
                let keys = (by(first, order), (by(second, then), by_id));
                places(searcher.search(&query, &(top.order_by(keys), Count))?)
            }
        })
    }
}

/// What splits text into words for this index.
pub(crate) fn analyzer(searcher: &Searcher) -> tantivy::Result<TextAnalyzer> {
    let analyzer = searcher.index().tokenizers().get(WORDS);
    analyzer.ok_or_else(|| tantivy::TantivyError::InternalError(format!("no tokenizer `{WORDS}`")))
}
