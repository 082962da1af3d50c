//! `/indexes/{index}/search`.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Path, Query, State};
use change::{Field, Lsn};
use serde::Serialize;
use serde_json::value::RawValue;
use tantivy::Order;
use tantivy::tokenizer::TextAnalyzer;

use super::Filling;
use super::answer::{push_attribute, raw, selected, values};
use super::error::ApiError;
use super::params::{Params, Wait};
use crate::definition::Role;
use crate::document::{push_string, push_value};
use crate::filter::{self, Filter};
use crate::highlight::{Marks, formatted};
use crate::index::{Layout, stored_json};
use crate::indexes::View;
use crate::query::{self, Search, Words};

const DEFAULT_LIMIT: usize = 20;
/// Most hits in an answer.
const MAX_LIMIT: usize = 1_000;
/// Largest offset; each hit before it costs memory and time.
const MAX_OFFSET: usize = 10_000;
/// Longest `q`, bytes.
const MAX_QUERY_BYTES: usize = 2_048;
/// Most columns in `sort`.
const MAX_SORT: usize = 2;
const DEFAULT_CROP: usize = 10;
/// Most words that a text is cropped to.
const MAX_CROP: usize = 10_000;

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Answer {
    hits: Vec<Box<RawValue>>,
    query: String,
    processing_time_ms: u64,
    limit: usize,
    offset: usize,
    estimated_total_hits: usize,
    /// What the hits show.
    lsn: Lsn,
}

struct Request {
    q: String,
    all_words: bool,
    filter: Option<Filter>,
    sort: Vec<String>,
    offset: usize,
    limit: usize,
    retrieve: Option<Vec<String>>,
    highlight: Vec<String>,
    pre_tag: String,
    post_tag: String,
    crop: Vec<String>,
    crop_length: usize,
    crop_marker: String,
    wait: Wait,
}

impl Request {
    fn read(mut params: Params) -> Result<Request, ApiError> {
        let mut text = |name, code, default: &str| {
            params.text(name, code).map(|text| text.unwrap_or_else(|| default.to_owned()))
        };
        let q = text("q", "invalid_search_q", "")?;
        if q.len() > MAX_QUERY_BYTES {
            let message = format!("Invalid value for `q`: expected at most {MAX_QUERY_BYTES} bytes.");
            return Err(ApiError::invalid("invalid_search_q", message));
        }
        let pre_tag = text("highlightPreTag", "invalid_search_highlight_pre_tag", "<em>")?;
        let post_tag = text("highlightPostTag", "invalid_search_highlight_post_tag", "</em>")?;
        let crop_marker = text("cropMarker", "invalid_search_crop_marker", "…")?;
        let strategy = text("matchingStrategy", "invalid_search_matching_strategy", "last")?;
        if !["last", "all", "frequency"].contains(&strategy.as_str()) {
            let message = "Invalid value for `matchingStrategy`: expected one of `last`, `all`, `frequency`.";
            return Err(ApiError::invalid("invalid_search_matching_strategy", message));
        }
        let mut names = |name, code| params.names(name, code);
        let sort = names("sort", "invalid_search_sort")?.unwrap_or_default();
        let retrieve = names("attributesToRetrieve", "invalid_search_attributes_to_retrieve")?;
        let highlight = names("attributesToHighlight", "invalid_search_attributes_to_highlight")?;
        let crop = names("attributesToCrop", "invalid_search_attributes_to_crop")?;
        let crop_length = params.number("cropLength", "invalid_search_crop_length", MAX_CROP)?;
        let offset = params.number("offset", "invalid_search_offset", MAX_OFFSET)?;
        let limit = params.number("limit", "invalid_search_limit", MAX_LIMIT)?;
        let filter = params.take("filter").map_or(Ok(None), |filter| filter::parse_json(&filter));
        let filter = filter.map_err(|message| ApiError::invalid("invalid_search_filter", message))?;
        let wait = params.wait()?;
        params.end()?;
        Ok(Request {
            q,
            all_words: strategy == "all",
            filter,
            sort,
            offset: offset.unwrap_or(0),
            limit: limit.unwrap_or(DEFAULT_LIMIT),
            retrieve,
            highlight: highlight.unwrap_or_default(),
            pre_tag,
            post_tag,
            crop: crop.unwrap_or_default(),
            crop_length: crop_length.unwrap_or(DEFAULT_CROP),
            crop_marker,
            wait,
        })
    }

    fn answer(self, view: &View, begun: Instant) -> Result<Answer, ApiError> {
        let View { searcher, layout, .. } = view;
        let mut analyzer = query::analyzer(searcher)?;
        let words = Words::read(&self.q, &mut analyzer);
        let wanted = words.wanted();
        let filter = self.filter.as_ref().map(|filter| filter::compile(filter, layout)).transpose();
        let filter = filter.map_err(|message| ApiError::invalid("invalid_search_filter", message))?;
        let sort = sort(&self.sort, layout)?;
        let (offset, limit) = (self.offset, self.limit);
        let search = Search { words, all_words: self.all_words, filter, sort, offset, limit };
        let (found, total) = search.run(searcher, layout)?;
        let attributes = view.attributes();
        let mut shown = Shown::new(&self, &attributes, wanted, analyzer);
        let hit = |address| raw(shown.hit(stored_json(searcher, layout, address)?)?);
        let hits = found.into_iter().map(hit).collect::<Result<Vec<_>, _>>()?;
        Ok(Answer {
            hits,
            query: self.q,
            processing_time_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
            limit,
            offset,
            estimated_total_hits: total,
            lsn: view.payload.checkpoint.lsn,
        })
    }
}

/// `["sent_at:desc"]` as places among the definition's roles.
fn sort(names: &[String], layout: &Layout) -> Result<Vec<(usize, Order)>, ApiError> {
    let wrong = |message: String| ApiError::invalid("invalid_search_sort", message);
    if names.len() > MAX_SORT {
        return Err(wrong(format!("Invalid value for `sort`: expected at most {MAX_SORT} attributes.")));
    }
    let one = |text: &String| {
        let (name, order) = match text.rsplit_once(':') {
            Some((name, "asc")) => (name, Order::Asc),
            Some((name, "desc")) => (name, Order::Desc),
            _ => {
                return Err(wrong(format!(
                    "Invalid syntax for the sort parameter: expected `{text}:asc` or `{text}:desc`."
                )));
            }
        };
        match layout.filterable(name) {
            Some((Role::Number | Role::Date, place)) => Ok((place, order)),
            _ => {
                let columns =
                    layout.definition.roles().filter(|(role, _)| matches!(role, Role::Number | Role::Date));
                let names: Vec<String> = columns.map(|(_, name)| format!("`{name}`")).collect();
                let names = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
                Err(wrong(format!(
                    "Attribute `{name}` is not sortable. Available sortable attributes are: {names}."
                )))
            }
        }
    };
    names.iter().map(one).collect()
}

/// How hits are shown.
struct Shown<'a> {
    retrieved: Vec<&'a str>,
    whole: bool,
    /// Attributes of `_formatted`, with whether their words are marked and how far they are cropped.
    formatted: Vec<(&'a str, bool, Option<usize>)>,
    wanted: HashSet<String>,
    analyzer: TextAnalyzer,
    marks: Marks<'a>,
}

impl<'a> Shown<'a> {
    fn new(
        request: &'a Request,
        attributes: &[&'a str],
        wanted: HashSet<String>,
        analyzer: TextAnalyzer,
    ) -> Self {
        let retrieved = selected(attributes, request.retrieve.as_deref());
        let marked = selected(attributes, Some(&request.highlight));
        let cropped = |name: &str| {
            request.crop.iter().find_map(|entry| match entry.rsplit_once(':') {
                Some((wanted, length)) if wanted == name || wanted == "*" => length.parse().ok(),
                _ => (entry == name || entry == "*").then_some(request.crop_length),
            })
        };
        let format = |name: &&'a str| (*name, marked.contains(name), cropped(name));
        let any = !request.highlight.is_empty() || !request.crop.is_empty();
        let of_hit = |(name, mark, crop): &(&str, bool, Option<usize>)| {
            retrieved.contains(name) || *mark || crop.is_some()
        };
        Shown {
            formatted: attributes.iter().map(format).filter(|attribute| any && of_hit(attribute)).collect(),
            whole: request.retrieve.is_none() && !any,
            retrieved,
            wanted,
            analyzer,
            marks: Marks { before: &request.pre_tag, after: &request.post_tag, cut: &request.crop_marker },
        }
    }

    fn hit(&mut self, document: String) -> Result<String, ApiError> {
        if self.whole {
            return Ok(document);
        }
        let mut json = String::from("{");
        for (name, value) in values(&document, &self.retrieved)? {
            push_attribute(&mut json, name, |json| push_value(json, &value));
        }
        if !self.formatted.is_empty() {
            let inner = self.formatted(&document)?;
            push_attribute(&mut json, "_formatted", |json| json.push_str(&inner));
        }
        json.push('}');
        Ok(json)
    }

    /// As in Meilisearch, numbers become strings.
    fn formatted(&mut self, document: &str) -> Result<String, ApiError> {
        let names: Vec<&str> = self.formatted.iter().map(|(name, ..)| *name).collect();
        let mut json = String::from("{");
        for ((name, value), (_, mark, crop)) in values(document, &names)?.into_iter().zip(&self.formatted) {
            push_attribute(&mut json, name, |json| match &value {
                Field::Text(text) => {
                    let text = formatted(text, &self.wanted, &mut self.analyzer, &self.marks, *mark, *crop);
                    push_string(json, &text);
                }
                Field::Bare(token) if !matches!(*token, "true" | "false") => push_string(json, token),
                value => push_value(json, value),
            });
        }
        json.push('}');
        Ok(json)
    }
}

pub(super) async fn get(
    State(state): State<Arc<super::State>>,
    Path(index): Path<String>,
    Query(pairs): Query<Vec<(String, String)>>,
) -> Result<Json<Answer>, ApiError> {
    answer(&state, &index, Params::of_url(pairs)).await
}

pub(super) async fn post(
    State(state): State<Arc<super::State>>,
    Path(index): Path<String>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Answer>, ApiError> {
    answer(&state, &index, Params::of_body(body)?).await
}

async fn answer(state: &super::State, index: &str, params: Params) -> Result<Json<Answer>, ApiError> {
    let begun = Instant::now();
    let shelf = state.shelf(index)?.clone();
    let request = Request::read(params)?;
    let view = state.view(&shelf, &request.wait, Filling::Refused).await?;
    state.blocking(move || request.answer(&view, begun)).await.map(Json)
}
