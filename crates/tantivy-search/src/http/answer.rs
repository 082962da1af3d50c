//! What an index is and where it stands, and documents as they are shown.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use change::Field;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::error::ApiError;
use crate::document::{push_string, push_value};
use crate::indexes::Shelf;
use crate::payload::Payload;

pub(super) async fn health(State(state): State<Arc<super::State>>) -> Response {
    let named = |wanted: fn(Option<&Payload>) -> bool| -> Vec<&str> {
        let shelves = state.indexes.shelves().iter();
        let found = shelves.filter(|shelf| wanted(shelf.view().as_ref().map(|view| &view.payload)));
        found.map(|shelf| shelf.definition.name.as_str()).collect()
    };
    let missing = named(|payload| payload.is_none_or(|payload| !payload.checkpoint.ready));
    if missing.is_empty() {
        return Json(json!({"status": "available"})).into_response();
    }
    let filling = named(|payload| payload.is_none_or(|payload| !payload.is_whole()));
    let kept = named(|payload| payload.is_some_and(|payload| payload.kept));
    let parts =
        [("Being filled from the log", filling), ("Not following the log, and served as it was", kept)];
    let parts = parts.iter().filter(|(_, names)| !names.is_empty());
    let parts: Vec<String> = parts.map(|(what, names)| format!("{what}: {}.", names.join(", "))).collect();
    let message = parts.join(" ");
    let body = json!({
        "status": "unavailable", "indexes": missing,
        "message": message, "code": "index_not_ready", "type": "system", "link": "",
    });
    (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
}

pub(super) async fn indexes(State(state): State<Arc<super::State>>) -> Json<Value> {
    let results: Vec<Value> = state.indexes.shelves().iter().map(|shelf| described(shelf)).collect();
    Json(json!({"offset": 0, "limit": results.len(), "total": results.len(), "results": results}))
}

pub(super) async fn index(
    State(state): State<Arc<super::State>>,
    Path(index): Path<String>,
) -> Result<Json<Value>, ApiError> {
    state.shelf(&index).map(|shelf| Json(described(shelf)))
}

fn described(shelf: &Shelf) -> Value {
    let definition = &shelf.definition;
    let copy = shelf.copy();
    let rebuild = copy.as_ref().map(|copy| copy.payload.checkpoint.clone());
    let view = shelf.view().or(copy);
    // A composite key has no one column to name.
    let key = view.as_ref().map(|view| &view.payload.key);
    let primary_key = key.filter(|key| key.len() == 1).map(|key| &key[0]);
    json!({
        "uid": definition.name,
        "primaryKey": primary_key,
        "table": definition.table_name(),
        "numberOfDocuments": view.as_ref().map(|view| view.searcher.num_docs()),
        "checkpoint": view.as_ref().map(|view| &view.payload.checkpoint),
        "rebuild": rebuild,
    })
}

/// A document with only some of its attributes, in the document's order.
pub(super) fn projected(document: &str, names: &[&str]) -> Result<String, ApiError> {
    let mut json = String::from("{");
    for (name, value) in values(document, names)? {
        push_attribute(&mut json, name, |json| push_value(json, &value));
    }
    json.push('}');
    Ok(json)
}

/// The values of some attributes of a document, where it has them.
pub(super) fn values<'d>(
    document: &'d str,
    names: &[&'d str],
) -> Result<Vec<(&'d str, Field<'d>)>, ApiError> {
    let mut fields = Vec::new();
    change::fields(document, names, &mut fields).map_err(|error| ApiError::internal(&error))?;
    Ok(names.iter().copied().zip(fields).filter(|(_, field)| *field != Field::Missing).collect())
}

/// Appends `"name":value` to an object that is not closed yet.
pub(super) fn push_attribute(json: &mut String, name: &str, value: impl FnOnce(&mut String)) {
    if !json.ends_with('{') {
        json.push(',');
    }
    push_string(json, name);
    json.push(':');
    value(json);
}

/// JSON that was put together as text.
pub(super) fn raw(json: String) -> Result<Box<RawValue>, ApiError> {
    RawValue::from_string(json).map_err(|error| ApiError::internal(&error))
}

/// The attributes of a document that a list of names selects, `*` and no list meaning all.
pub(super) fn selected<'a>(attributes: &[&'a str], names: Option<&[String]>) -> Vec<&'a str> {
    let all = names.is_none_or(|names| names.iter().any(|name| name == "*"));
    let wanted = |name: &&str| all || names.is_some_and(|names| names.iter().any(|wanted| wanted == name));
    attributes.iter().copied().filter(wanted).collect()
}
