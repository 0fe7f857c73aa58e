//! NBD transport: the transmission phase of NBD connections. `session`: the negotiated parameters. `connection`:
//! requests. `output`: replies.

mod connection;
mod output;
mod session;

use std::os::fd::OwnedFd;
use std::sync::Arc;

pub use self::connection::Connection;
pub use self::session::{Detached, KIND, Selected, Session, Skipping, Unfinished};
use crate::device::Export;
use crate::engine::{Engine, EngineError, TransportHandle};
use crate::notice::Recipient;

/// Serves the transmission phase on a connected stream socket.
pub fn serve(
    engine: &Engine,
    export: &Arc<Export>,
    fd: OwnedFd,
    session: Session,
    recipient: Recipient,
) -> Result<TransportHandle, EngineError> {
    let connection = Connection::new(export.clone(), fd, session, engine.budget().clone());
    engine.serve(export, Box::new(connection), recipient)
}
