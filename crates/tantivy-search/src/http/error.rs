//! Error bodies as Meilisearch has them: `{"message","code","type","link"}`.

use std::time::Duration;

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use change::Lsn;
use serde_json::json;

/// An error as the client sees it.
#[derive(Debug)]
pub(super) struct ApiError {
    status: StatusCode,
    code: &'static str,
    message: String,
}

/// Codes that Meilisearch does not have; their `link` is empty.
const OURS: [&str; 5] =
    ["lsn_not_reached", "index_not_ready", "invalid_min_lsn", "invalid_timeout", "shutting_down"];

impl ApiError {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        ApiError { status, code, message: message.into() }
    }

    pub(super) fn invalid(code: &'static str, message: impl Into<String>) -> Self {
        ApiError::new(StatusCode::BAD_REQUEST, code, message)
    }

    pub(super) fn index_not_found(index: &str) -> Self {
        ApiError::new(StatusCode::NOT_FOUND, "index_not_found", format!("Index `{index}` not found."))
    }

    pub(super) fn document_not_found(id: &str) -> Self {
        ApiError::new(StatusCode::NOT_FOUND, "document_not_found", format!("Document `{id}` not found."))
    }

    pub(super) fn lsn_not_reached(index: &str, wanted: Lsn, at: Lsn, waited: Duration) -> Self {
        let waited = waited.as_millis();
        let message =
            format!("Index `{index}` stands at {at} and did not reach {wanted} within {waited} ms.");
        ApiError::new(StatusCode::GATEWAY_TIMEOUT, "lsn_not_reached", message)
    }

    pub(super) fn not_ready(index: &str) -> Self {
        let message = format!(
            "Index `{index}` is being filled from the log; GET /indexes/{index} shows how far it is."
        );
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "index_not_ready", message)
    }

    pub(super) fn stopping() -> Self {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "shutting_down", "The server is shutting down.")
    }

    pub(super) fn too_many() -> Self {
        let message = "Too many requests wait for a search. Retry later.";
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "too_many_search_requests", message)
    }

    pub(super) fn internal(error: &dyn std::error::Error) -> Self {
        tracing::error!(%error, "a search failed");
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", format!("The search failed: {error}."))
    }

    pub(super) fn too_large(limit: usize) -> Self {
        let message = format!("The body is larger than {limit} bytes.");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "payload_too_large", message)
    }

    pub(super) fn no_route() -> Self {
        ApiError::new(StatusCode::NOT_FOUND, "not_found", "There is no such route.")
    }

    pub(super) fn wrong_method() -> Self {
        ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "bad_request", "This route has no such method.")
    }

    fn kind(&self) -> &'static str {
        match self.status {
            StatusCode::INTERNAL_SERVER_ERROR => "internal",
            status if status.is_server_error() => "system",
            _ => "invalid_request",
        }
    }
}

impl From<tantivy::TantivyError> for ApiError {
    fn from(error: tantivy::TantivyError) -> Self {
        ApiError::internal(&error)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let code = self.code;
        let link = if OURS.contains(&code) {
            String::new()
        } else {
            format!("https://docs.meilisearch.com/errors#{code}")
        };
        let body = json!({"message": self.message, "code": code, "type": self.kind(), "link": link});
        (self.status, axum::Json(body)).into_response()
    }
}
