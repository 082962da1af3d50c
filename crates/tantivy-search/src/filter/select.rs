//! A choice of documents, put together of set operations on one bit per document.
//!
//! Tantivy can nest boolean queries itself, lazily. But in 0.27 a range over a fast field that is part of an
//! exclusion is asked for documents that it has passed already, which panics or, without overflow checks, is
//! undefined by its own contract. Evaluated leaf by leaf there is nothing to go wrong, and the cost is known: a
//! bit per document and operator, beside the leaves themselves.

use tantivy::query::{BitSetDocSet, ConstScorer, EnableScoring, Explanation, Query, Scorer, Weight};
use tantivy::{BitSet, DocId, Score, SegmentReader};

/// A query that selects and does not score.
#[derive(Clone, Debug)]
pub(crate) enum Selection {
    Everything,
    Nothing,
    Matches(std::sync::Arc<dyn Query>),
    All(Vec<Selection>),
    Any(Vec<Selection>),
    Not(Box<Selection>),
}

impl Selection {
    pub(crate) fn matches(query: impl Query) -> Selection {
        Selection::Matches(std::sync::Arc::new(query))
    }

    pub(crate) fn not(self) -> Selection {
        Selection::Not(Box::new(self))
    }

    fn plan(&self, scoring: EnableScoring<'_>) -> tantivy::Result<Plan> {
        let plans =
            |parts: &[Selection]| parts.iter().map(|part| part.plan(scoring)).collect::<Result<Vec<_>, _>>();
        Ok(match self {
            Selection::Everything => Plan::All(Vec::new()),
            Selection::Nothing => Plan::Any(Vec::new()),
            Selection::Matches(query) => Plan::Matches(query.weight(scoring)?),
            Selection::All(parts) => Plan::All(plans(parts)?),
            Selection::Any(parts) => Plan::Any(plans(parts)?),
            Selection::Not(part) => Plan::Not(Box::new(part.plan(scoring)?)),
        })
    }
}

impl Query for Selection {
    fn weight(&self, scoring: EnableScoring<'_>) -> tantivy::Result<Box<dyn Weight>> {
        let scoring = match scoring {
            EnableScoring::Enabled { searcher, .. } => EnableScoring::disabled_from_searcher(searcher),
            disabled => disabled,
        };
        Ok(Box::new(self.plan(scoring)?))
    }
}

/// A selection for one searcher.
enum Plan {
    Matches(Box<dyn Weight>),
    All(Vec<Plan>),
    Any(Vec<Plan>),
    Not(Box<Plan>),
}

impl Plan {
    fn bits(&self, reader: &SegmentReader) -> tantivy::Result<Bits> {
        Ok(match self {
            Plan::Matches(weight) => {
                let mut bits = Bits::none(reader.max_doc());
                weight
                    .for_each_no_score(reader, &mut |docs| docs.iter().for_each(|doc| bits.insert(*doc)))?;
                bits
            }
            Plan::All(parts) => {
                let mut bits = Bits::none(reader.max_doc()).complement();
                for part in parts {
                    bits.combine(&part.bits(reader)?, |a, b| a & b);
                }
                bits
            }
            Plan::Any(parts) => {
                let mut bits = Bits::none(reader.max_doc());
                for part in parts {
                    bits.combine(&part.bits(reader)?, |a, b| a | b);
                }
                bits
            }
            Plan::Not(part) => part.bits(reader)?.complement(),
        })
    }
}

impl Weight for Plan {
    fn scorer(&self, reader: &SegmentReader, _boost: Score) -> tantivy::Result<Box<dyn Scorer>> {
        let docs = BitSetDocSet::from(self.bits(reader)?.into_set());
        Ok(Box::new(ConstScorer::new(docs, 0.0)))
    }

    fn explain(&self, _reader: &SegmentReader, _doc: DocId) -> tantivy::Result<Explanation> {
        Ok(Explanation::new("selected", 0.0))
    }
}

/// A set of a segment's documents.
struct Bits {
    words: Vec<u64>,
    size: u32,
}

impl Bits {
    fn none(size: u32) -> Bits {
        Bits { words: vec![0; size.div_ceil(64) as usize], size }
    }

    fn insert(&mut self, doc: DocId) {
        self.words[doc as usize / 64] |= 1 << (doc % 64);
    }

    fn combine(&mut self, other: &Bits, with: impl Fn(u64, u64) -> u64) {
        for (word, other) in self.words.iter_mut().zip(&other.words) {
            *word = with(*word, *other);
        }
    }

    /// Bits past the last document change too; nobody looks at them.
    fn complement(mut self) -> Bits {
        self.words.iter_mut().for_each(|word| *word = !*word);
        self
    }

    fn into_set(self) -> BitSet {
        let mut set = BitSet::with_max_value(self.size);
        for (place, mut word) in (0u32..).zip(self.words) {
            while word != 0 {
                let doc = place * 64 + word.trailing_zeros();
                if doc < self.size {
                    set.insert(doc);
                }
                word &= word - 1;
            }
        }
        set
    }
}
