//! Python bindings of the engine. No logic: this crate only converts types.
//!
//! Every call that moves bytes or may wait detaches from the interpreter. A panic in the engine becomes a
//! PanicException on the calling thread; event loops have no caller and must not panic.

mod backend;
mod border;
mod device;
mod device_copy;
mod export;
mod fault;
mod filters;
mod fuse;
mod log;
mod maps;
mod mount;
mod nbd;
mod nbd_client;
mod tee;
mod tls;
mod ublk;
mod vhost_user;

use pyo3::prelude::*;

#[pymodule]
mod _engine {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::backend::{BackendOperation, BackendQueue};
    #[pymodule_export]
    use crate::device::{Device, Engine};
    #[pymodule_export]
    use crate::device_copy::DeviceCopy;
    #[pymodule_export]
    use crate::export::{Export, Notices, Transport};
    #[pymodule_export]
    use crate::fault::Fault;
    #[pymodule_export]
    use crate::filters::{BadBlockFilter, DelayFilter, ErrorFilter, FlakeyFilter, SwitchFilter, ThrottleFilter};
    #[pymodule_export]
    use crate::fuse::{
        DetachedFuse, FuseFile, fuse_can_resend, fuse_init, fuse_invalidate, fuse_is_over_uring, fuse_resend,
        serve_fuse,
    };
    #[pymodule_export]
    use crate::log::{end_log, has_log_records, log_records};
    #[pymodule_export]
    use crate::maps::{ClusterTable, Extent, File, Map, Region};
    #[pymodule_export]
    use crate::mount::{mount, unmount};
    #[pymodule_export]
    use crate::nbd::{Detached, serve_nbd};
    #[pymodule_export]
    use crate::nbd_client::NbdClient;
    #[pymodule_export]
    use crate::tee::Tee;
    #[pymodule_export]
    use crate::tls::{TlsClient, TlsServer, TlsSession};
    #[pymodule_export]
    use crate::ublk::{UblkNode, serve_ublk, ublk_control};
    #[pymodule_export]
    use crate::vhost_user::{
        DetachedVhostUser, GuestMemory, SharedMemory, VhostUserCall, VhostUserDisk, VhostUserLog, raise_event,
        serve_vhost_user, vhost_user_inflight_length,
    };

    #[pymodule_init]
    fn init(_module: &Bound<'_, PyModule>) -> PyResult<()> {
        blkloom_core::log::collect();
        Ok(())
    }
}
