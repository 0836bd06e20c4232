//! The GPU that was measured.

use kvring_gpu_kernels::raw::Device;
use serde::Serialize;
use std::path::Path;

/// The GPU and its machine, as `--json` shows them.
#[derive(Clone, Debug, Serialize)]
pub(super) struct About {
    name: String,
    device: u32,
    compute_capability: String,
    /// Streaming multiprocessors.
    multiprocessors: u32,
    memory_bytes: u64,
    /// NVIDIA's own number of the driver, if the kernel says it.
    driver: Option<String>,
    /// The CUDA version that the driver has.
    cuda: Option<String>,
    pci: Option<String>,
    /// The link as the kernel sees it, if we may read that.
    pcie: Option<Link>,
    /// CPUs of this machine that this process may use.
    cpus: usize,
}

/// A PCIe link: what it has, and what it could have. An idle one is slower.
#[derive(Clone, Debug, Serialize)]
struct Link {
    speed: String,
    width: String,
    max_speed: String,
    max_width: String,
    numa_node: Option<i32>,
}

fn read(path: &Path) -> Option<String> {
    Some(std::fs::read_to_string(path).ok()?.trim().to_owned()).filter(|text| !text.is_empty())
}

impl Link {
    fn of(folder: &Path) -> Option<Link> {
        let field = |name: &str| read(&folder.join(name));
        Some(Link {
            speed: field("current_link_speed")?,
            width: field("current_link_width")?,
            max_speed: field("max_link_speed")?,
            max_width: field("max_link_width")?,
            numa_node: field("numa_node").and_then(|node| node.parse().ok()),
        })
    }
}

impl About {
    /// Describes a device that has just been busy, so that its link is awake.
    pub(super) fn of(device: &Device) -> About {
        let info = device.info();
        let (major, minor) = info.compute_capability;
        let pci = device.pci_address();
        About {
            name: info.name.clone(),
            device: info.device,
            compute_capability: format!("{major}.{minor}"),
            multiprocessors: info.multiprocessors,
            memory_bytes: info.memory_bytes,
            driver: read(Path::new("/sys/module/nvidia/version")),
            cuda: device.cuda_version().map(|version| format!("{}.{}", version / 1000, version % 1000 / 10)),
            pcie: pci.as_ref().and_then(|pci| Link::of(&Path::new("/sys/bus/pci/devices").join(pci))),
            pci,
            cpus: std::thread::available_parallelism().map_or(1, core::num::NonZero::get),
        }
    }

    /// The same in one line, for people.
    pub(super) fn describe(&self) -> String {
        let or_unknown = |text: &Option<String>| text.clone().unwrap_or_else(|| "unknown".to_owned());
        let link = match &self.pcie {
            Some(Link { speed, width, max_speed, max_width, .. }) => {
                format!("PCIe {speed} x{width} (at most {max_speed} x{max_width})")
            }
            None => "PCIe link unknown".to_owned(),
        };
        format!(
            "{}, {} SMs, {:.0} GiB; driver {}, CUDA {}; {link}",
            self.name,
            self.multiprocessors,
            self.memory_bytes as f64 / f64::from(1 << 30),
            or_unknown(&self.driver),
            or_unknown(&self.cuda),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_read_as_the_kernel_writes_it() {
        let folder = std::env::temp_dir().join(format!("kvring-link-{}", std::process::id()));
        std::fs::create_dir(&folder).unwrap();
        assert!(Link::of(&folder).is_none());
        for (name, text) in [
            ("current_link_speed", "32.0 GT/s PCIe\n"),
            ("current_link_width", "16\n"),
            ("max_link_speed", "32.0 GT/s PCIe\n"),
            ("max_link_width", "16\n"),
            ("numa_node", "-1\n"),
        ] {
            std::fs::write(folder.join(name), text).unwrap();
        }
        let link = Link::of(&folder).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        assert_eq!((link.speed.as_str(), link.width.as_str()), ("32.0 GT/s PCIe", "16"));
        assert_eq!(link.numa_node, Some(-1));
    }
}
