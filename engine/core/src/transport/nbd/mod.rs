//! NBD transport: the transmission phase of NBD connections. `session`: the negotiated parameters. `connection`:
//! requests. `output`: replies. `stream`: the socket, or what encrypts the bytes on it.

mod connection;
mod output;
mod session;
mod stream;

use std::sync::Arc;

pub use self::connection::Connection;
pub use self::session::{Detached, KIND, Selected, Session, Skipping, Unfinished};
pub use self::stream::{Stream, StreamError};
use crate::device::Export;
use crate::engine::{Engine, EngineError, TransportHandle};
use crate::notice::Recipient;

/// Serves the transmission phase on a connected stream: a socket (`OwnedFd`), or what encrypts its bytes.
pub fn serve(
    engine: &Engine,
    export: &Arc<Export>,
    stream: impl Into<Box<dyn Stream>>,
    session: Session,
    recipient: Recipient,
) -> Result<TransportHandle, EngineError> {
    let connection = Connection::new(export.clone(), stream.into(), session, engine.budget().clone());
    engine.serve(export, Box::new(connection), recipient)
}
