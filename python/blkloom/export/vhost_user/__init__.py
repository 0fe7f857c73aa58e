"""Devices as virtio block devices of virtual machines, over vhost-user."""
