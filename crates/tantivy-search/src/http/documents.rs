//! Documents by id and by page.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Path, Query, State};
use serde::Serialize;
use serde_json::Value;
use serde_json::value::RawValue;
use worker::Checkpoint;

use super::Filling;
use super::answer::{projected, raw, selected};
use super::error::ApiError;
use super::params::{Params, Wait};
use crate::indexes::View;
use crate::{index, listing};

const DEFAULT_LIMIT: usize = 20;
/// Most documents in an answer.
const MAX_LIMIT: usize = 1_000;
/// Largest offset; `after` has no such bound and does not slow down.
const MAX_OFFSET: usize = 100_000;

#[derive(Serialize)]
pub(super) struct Page {
    results: Vec<Box<RawValue>>,
    offset: usize,
    limit: usize,
    total: u64,
    /// What these documents are the state of.
    checkpoint: Checkpoint,
}

/// Which documents.
struct Request {
    ids: Option<Vec<String>>,
    after: Option<String>,
    fields: Option<Vec<String>>,
    offset: usize,
    limit: usize,
    wait: Wait,
}

impl Request {
    fn read(mut params: Params) -> Result<Request, ApiError> {
        let ids = ids(params.take("ids"))?;
        let default_limit = ids.as_ref().map_or(DEFAULT_LIMIT, Vec::len);
        let request = Request {
            ids,
            after: params.text("after", "invalid_document_after")?,
            fields: params.names("fields", "invalid_document_fields")?,
            offset: params.number("offset", "invalid_document_offset", MAX_OFFSET)?.unwrap_or(0),
            limit: params.number("limit", "invalid_document_limit", MAX_LIMIT)?.unwrap_or(default_limit),
            wait: params.wait()?,
        };
        params.end()?;
        Ok(request)
    }

    fn documents(&self, view: &View) -> Result<Vec<String>, ApiError> {
        let View { searcher, layout, .. } = view;
        let Some(ids) = &self.ids else {
            let after = self.after.as_deref();
            return Ok(listing::page(searcher, layout, after, self.offset, self.limit)?);
        };
        let found = ids.iter().map(|id| index::document(searcher, layout, id)).filter_map(Result::transpose);
        Ok(found.skip(self.offset).take(self.limit).collect::<Result<_, _>>()?)
    }

    fn answer(&self, view: &View) -> Result<Page, ApiError> {
        let attributes = view.attributes();
        let names = selected(&attributes, self.fields.as_deref());
        let shown = |document: String| {
            if self.fields.is_some() { raw(projected(&document, &names)?) } else { raw(document) }
        };
        let results = self.documents(view)?.into_iter().map(shown).collect::<Result<Vec<_>, _>>()?;
        let total = if self.ids.is_some() { results.len() as u64 } else { view.searcher.num_docs() };
        Ok(Page {
            results,
            offset: self.offset,
            limit: self.limit,
            total,
            checkpoint: view.payload.checkpoint.clone(),
        })
    }
}

fn ids(value: Option<Value>) -> Result<Option<Vec<String>>, ApiError> {
    let wrong = || {
        let message =
            format!("Invalid value for `ids`: expected a list of at most {MAX_LIMIT} strings or numbers.");
        ApiError::invalid("invalid_document_ids", message)
    };
    let id = |value: Value| match value {
        Value::String(id) => Ok(id),
        Value::Number(id) => Ok(id.to_string()),
        _ => Err(wrong()),
    };
    match value {
        None => Ok(None),
        Some(Value::Array(ids)) if ids.len() <= MAX_LIMIT => {
            ids.into_iter().map(id).collect::<Result<_, _>>().map(Some)
        }
        Some(_) => Err(wrong()),
    }
}

pub(super) async fn list(
    State(state): State<Arc<super::State>>,
    Path(index): Path<String>,
    Query(pairs): Query<Vec<(String, String)>>,
) -> Result<Json<Page>, ApiError> {
    answer(&state, &index, Params::of_url(pairs)).await
}

pub(super) async fn fetch(
    State(state): State<Arc<super::State>>,
    Path(index): Path<String>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Page>, ApiError> {
    answer(&state, &index, Params::of_body(body)?).await
}

async fn answer(state: &super::State, index: &str, params: Params) -> Result<Json<Page>, ApiError> {
    let shelf = state.shelf(index)?.clone();
    let request = Request::read(params)?;
    // `verify` and people want to look into an index that is being filled; the checkpoint says that it is.
    let view = state.view(&shelf, &request.wait, Filling::Shown).await?;
    state.blocking(move || request.answer(&view)).await.map(Json)
}

pub(super) async fn one(
    State(state): State<Arc<super::State>>,
    Path((index, id)): Path<(String, String)>,
    Query(pairs): Query<Vec<(String, String)>>,
) -> Result<Json<Box<RawValue>>, ApiError> {
    let shelf = state.shelf(&index)?.clone();
    let mut params = Params::of_url(pairs);
    let fields = params.names("fields", "invalid_document_fields")?;
    let wait = params.wait()?;
    params.end()?;
    let view = state.view(&shelf, &wait, Filling::Refused).await?;
    let found = move || {
        let document = index::document(&view.searcher, &view.layout, &id)?;
        let document = document.ok_or_else(|| ApiError::document_not_found(&id))?;
        let attributes = view.attributes();
        match fields {
            Some(fields) => raw(projected(&document, &selected(&attributes, Some(&fields)))?),
            None => raw(document),
        }
    };
    state.blocking(found).await.map(Json)
}
