//! The glue: Python's view of the engine. No logic; types cross here and nothing else happens.
//!
//! Every call that moves bytes or may wait detaches from the interpreter. A panic in the engine would
//! surface as PanicException on the calling thread; loops have no caller and must not panic.

mod border;
mod device;
mod export;
mod fault;
mod places;

use pyo3::prelude::*;

#[pymodule]
mod _engine {
    #[pymodule_export]
    use crate::device::{Device, Engine};
    #[pymodule_export]
    use crate::export::{Connection, Detached, Export, Notices, serve_nbd};
    #[pymodule_export]
    use crate::fault::Fault;
    #[pymodule_export]
    use crate::places::{ClusterTable, Extent, File, Map, Region};
}
