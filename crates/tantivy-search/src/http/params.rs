//! Parameters, whether from a query string or from a JSON body: taken out one by one, each with its own error.

use std::time::Duration;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use change::Lsn;
use serde_json::{Map, Value};

use super::MAX_BODY_BYTES;
use super::error::ApiError;

const DEFAULT_TIMEOUT: Duration = Duration::from_secs(5);
const MAX_TIMEOUT: Duration = Duration::from_secs(60);
/// Most names in a list of attributes.
const MAX_NAMES: usize = 200;
/// Longest name, mark or id in a parameter, bytes.
const MAX_TEXT_BYTES: usize = 128 << 10;

/// The parameters that were not taken yet.
pub(super) struct Params {
    left: Map<String, Value>,
    /// In a query string lists are separated by commas and numbers are text.
    from_url: bool,
    known: Vec<&'static str>,
}

/// Whether and how long to wait for an LSN.
#[derive(Clone, Debug)]
pub(super) struct Wait {
    pub(super) lsn: Option<Lsn>,
    pub(super) timeout: Duration,
}

impl Params {
    pub(super) fn of_url(pairs: Vec<(String, String)>) -> Self {
        let left = pairs.into_iter().map(|(name, value)| (name, Value::String(value))).collect();
        Params { left, from_url: true, known: Vec::new() }
    }

    pub(super) fn of_body(body: Result<Bytes, BytesRejection>) -> Result<Self, ApiError> {
        let body = body.map_err(|rejection| match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => ApiError::too_large(MAX_BODY_BYTES),
            _ => ApiError::invalid("bad_request", rejection.body_text()),
        })?;
        if body.is_empty() {
            return Ok(Params { left: Map::new(), from_url: false, known: Vec::new() });
        }
        let left = serde_json::from_slice(&body).map_err(|error| {
            ApiError::invalid(
                "malformed_payload",
                format!("The `json` payload provided is malformed. `{error}`."),
            )
        })?;
        Ok(Params { left, from_url: false, known: Vec::new() })
    }

    /// Takes a parameter; `null` is the same as none.
    pub(super) fn take(&mut self, name: &'static str) -> Option<Value> {
        self.known.push(name);
        self.left.remove(name).filter(|value| !value.is_null())
    }

    pub(super) fn text(
        &mut self,
        name: &'static str,
        code: &'static str,
    ) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) if text.len() <= MAX_TEXT_BYTES => Ok(Some(text)),
            Some(_) => Err(wrong(name, code, &format!("a string of at most {MAX_TEXT_BYTES} bytes"))),
        }
    }

    /// A number from 0 to `most`.
    pub(super) fn number(
        &mut self,
        name: &'static str,
        code: &'static str,
        most: usize,
    ) -> Result<Option<usize>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let number = match &value {
            Value::String(text) if self.from_url => text.parse().ok(),
            Value::Number(number) => number.as_u64().and_then(|number| usize::try_from(number).ok()),
            _ => None,
        };
        match number {
            Some(number) if number <= most => Ok(Some(number)),
            _ => Err(wrong(name, code, &format!("a number from 0 to {most}"))),
        }
    }

    pub(super) fn names(
        &mut self,
        name: &'static str,
        code: &'static str,
    ) -> Result<Option<Vec<String>>, ApiError> {
        let error = || wrong(name, code, &format!("a list of at most {MAX_NAMES} strings"));
        let names: Vec<String> = match self.take(name) {
            None => return Ok(None),
            Some(Value::String(text)) if self.from_url => {
                text.split(',').map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).collect()
            }
            Some(Value::Array(values)) => {
                let name = |value: Value| value.as_str().map(str::to_owned);
                values.into_iter().map(name).collect::<Option<_>>().ok_or_else(error)?
            }
            Some(_) => return Err(error()),
        };
        if names.len() > MAX_NAMES { Err(error()) } else { Ok(Some(names)) }
    }

    pub(super) fn wait(&mut self) -> Result<Wait, ApiError> {
        let lsn = self.text("min_lsn", "invalid_min_lsn")?.map(|text| text.parse::<Lsn>()).transpose();
        let lsn = lsn.map_err(|error| {
            ApiError::invalid("invalid_min_lsn", format!("Parameter `min_lsn`: {error}."))
        })?;
        let timeout = self.number("timeout", "invalid_timeout", MAX_TIMEOUT.as_millis() as usize)?;
        let timeout = timeout.map_or(DEFAULT_TIMEOUT, |ms| Duration::from_millis(ms as u64));
        Ok(Wait { lsn, timeout })
    }

    /// Refuses what nobody took.
    pub(super) fn end(self) -> Result<(), ApiError> {
        let Some(name) = self.left.keys().next() else { return Ok(()) };
        let known: Vec<String> = self.known.iter().map(|name| format!("`{name}`")).collect();
        let message = format!("Unknown parameter `{name}`: expected one of {}.", known.join(", "));
        Err(ApiError::invalid("bad_request", message))
    }
}

fn wrong(name: &str, code: &'static str, wanted: &str) -> ApiError {
    ApiError::invalid(code, format!("Invalid value for `{name}`: expected {wanted}."))
}
