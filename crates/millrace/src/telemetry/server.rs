//! `/health` and `/metrics` over HTTP.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

use super::Telemetry;

/// The content type of Prometheus' text form as `prometheus_client` writes it.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Serves at each of these addresses until the runtime ends. Returns once all of them are bound.
pub(crate) fn serve(
    runtime: &Runtime,
    addresses: impl IntoIterator<Item = SocketAddr>,
    telemetry: &Arc<Telemetry>,
) -> anyhow::Result<()> {
    // Parts of one process may share an address.
    for address in addresses.into_iter().collect::<BTreeSet<_>>() {
        let listener = runtime
            .block_on(TcpListener::bind(address))
            .with_context(|| format!("cannot serve /health and /metrics at {address}"))?;
        let routes = Router::new()
            .route("/health", get(health))
            .route("/metrics", get(metrics))
            .with_state(telemetry.clone());
        tracing::info!(%address, "serving /health and /metrics");
        // Ends with the runtime, which its owner drops last.
        runtime.spawn(async move {
            if let Err(error) = axum::serve(listener, routes).await {
                tracing::error!(%error, "/health and /metrics are no longer served");
            }
        });
    }
    Ok(())
}

async fn health(State(telemetry): State<Arc<Telemetry>>) -> impl IntoResponse {
    let parts = telemetry.health();
    let ready = parts.values().all(|part| part.ready);
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(parts))
}

async fn metrics(State(telemetry): State<Arc<Telemetry>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, OPEN_METRICS)], telemetry.text())
}
