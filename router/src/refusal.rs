// SPDX-License-Identifier: Apache-2.0

//! Answers that are the router's own, with the statuses and words of upstream's routers, which
//! clients may know.

use hyper::{Response, StatusCode, header};
use serde_json::json;

use crate::body::Body;

/// Why a request gets no answer of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("X-Sandbox-ID header is required.")]
    NoId,
    #[error("Invalid sandbox ID format.")]
    Id,
    #[error("Invalid namespace format.")]
    Namespace,
    #[error("Invalid port format.")]
    Port,
    #[error("Invalid target IP address.")]
    PodIp,
    #[error("Missing or invalid Authorization header.")]
    NoToken,
    #[error("Invalid token.")]
    WrongToken,
    #[error("Method not allowed.")]
    Method,
    /// Of the sandbox with this name.
    #[error("Could not connect to the backend sandbox: {0}")]
    Unreachable(String),
    /// The same.
    #[error("Timed out waiting for the backend sandbox: {0}")]
    TimedOut(String),
    #[error("Backend attempted an upgrade that was not asked for.")]
    Upgrade,
    #[error("Backend did not open a WebSocket.")]
    NoWebSocket,
}

impl Refusal {
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::NoId | Self::Id | Self::Namespace | Self::Port | Self::PodIp => {
                StatusCode::BAD_REQUEST
            }
            Self::NoToken | Self::WrongToken => StatusCode::UNAUTHORIZED,
            Self::Method => StatusCode::METHOD_NOT_ALLOWED,
            Self::Unreachable(_) | Self::Upgrade | Self::NoWebSocket => StatusCode::BAD_GATEWAY,
            Self::TimedOut(_) => StatusCode::GATEWAY_TIMEOUT,
        }
    }

    pub(crate) fn response(&self) -> Response<Body> {
        json_response(self.status(), &json!({"detail": self.to_string()}))
    }
}

/// An answer with a JSON document.
pub(crate) fn json_response(status: StatusCode, document: &serde_json::Value) -> Response<Body> {
    let mut response = Response::new(Body::text(document.to_string()));
    *response.status_mut() = status;
    let json = header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}
