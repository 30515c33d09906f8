//! The speed of a GPU's link: measured once for each GPU and link, and kept in the user's cache folder.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use std::{env, fs, io};

use kvortex_mem::copy::gpu::{GpuCopy, Profile, Rates};
use kvortex_mem::device::{Device, DeviceInfo};
use parking_lot::Mutex;
use sha2::{Digest, Sha256};

use crate::sync::Arc;

/// Written by an older measurement than this, a profile is measured again: machines change.
const KEPT: Duration = Duration::from_secs(30 * 24 * 3600);

const TITLE: &str = "kvortex link profile 1";

static MEASURED: Mutex<Option<HashMap<String, Profile>>> = Mutex::new(None);

/// The profile of `device`'s link: of this process, else of the cache folder, else measured in about 100 ms; an assumed one if
/// it cannot be measured. `fresh` measures in any case.
pub fn link_profile(device: &Arc<dyn Device>, fresh: bool) -> Profile {
    let mut measured = MEASURED.lock();
    let measured = measured.get_or_insert_default();
    let identity = identity(device.info());
    let known = measured.get(&identity).copied().filter(|_| !fresh);
    let profile = known.unwrap_or_else(|| found(device, &identity, fresh));
    measured.insert(identity, profile);
    profile
}

fn found(device: &Arc<dyn Device>, identity: &str, fresh: bool) -> Profile {
    // What has no place on a bus is a simulation.
    let file = folder().filter(|_| !device.info().bus_id.is_empty()).map(|folder| folder.join(file_name(identity)));
    let kept = file.as_deref().filter(|_| !fresh).and_then(|file| read(file, identity));
    let name = &device.info().name;
    if let Some(profile) = kept {
        log::debug!("link of {name}, as measured before: {profile:?}");
        return profile;
    }
    match GpuCopy::calibrate(device) {
        Ok(profile) => {
            log::info!("link of {name}: {profile:?}");
            let written = file.as_deref().map_or(Ok(()), |file| write(file, &text(identity, &profile)));
            written.unwrap_or_else(|error| log::debug!("the profile of {name}'s link was not kept: {error}"));
            profile
        }
        Err(error) => {
            log::warn!("the link of {name} could not be measured: {error}");
            Profile::ASSUMED
        }
    }
}

/// What a profile holds for: the GPU, its place, its driver and the widest its link can be.
fn identity(info: &DeviceInfo) -> String {
    let DeviceInfo { name, bus_id, driver, .. } = info;
    let link = |what| {
        let path = format!("/sys/bus/pci/devices/{}/max_link_{what}", bus_id.to_lowercase());
        fs::read_to_string(path).map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned())
    };
    format!("{name}, {bus_id}, CUDA {}.{}, {} x{}", driver.0, driver.1, link("speed"), link("width"))
}

fn file_name(identity: &str) -> String {
    let digest = Sha256::digest(identity.as_bytes());
    let hex = digest.iter().take(8).fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    });
    format!("link-{hex}.txt")
}

/// `kvortex` in the user's cache folder.
fn folder() -> Option<PathBuf> {
    let given = env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let base = given.or_else(|| env::home_dir().map(|home| home.join(".cache")))?;
    Some(base.join("kvortex"))
}

fn text(identity: &str, profile: &Profile) -> String {
    let line = |name: &str, rates: &Rates| {
        let Rates { link, kernel, copy_us, staged_us } = rates;
        format!("{name} {link} {kernel} {copy_us} {staged_us}\n")
    };
    format!("{TITLE}\n{identity}\n{}{}", line("store", &profile.store), line("load", &profile.load))
}

/// The profile that a file holds for `identity`; `None` for anything that is not one, or too old.
fn read(file: &Path, identity: &str) -> Option<Profile> {
    let age = SystemTime::now().duration_since(fs::metadata(file).ok()?.modified().ok()?);
    if age.is_ok_and(|age| age > KEPT) {
        return None;
    }
    let text = fs::read_to_string(file).ok()?;
    let mut lines = text.lines();
    let told = (lines.next()?, lines.next()?);
    let (store, load) = (rates(lines.next()?, "store")?, rates(lines.next()?, "load")?);
    (told == (TITLE, identity) && lines.next().is_none()).then_some(Profile { store, load })
}

fn rates(line: &str, name: &str) -> Option<Rates> {
    let numbers: Vec<f64> = line.strip_prefix(name)?.split_whitespace().map_while(|word| word.parse().ok()).collect();
    match numbers[..] {
        [link, kernel, copy_us, staged_us] if numbers.iter().all(|&number| number > 0.0 && number < 1e9) => {
            Some(Rates { link, kernel, copy_us, staged_us })
        }
        _ => None,
    }
}

/// Writes a whole file or none.
fn write(file: &Path, text: &str) -> io::Result<()> {
    if let Some(folder) = file.parent() {
        fs::create_dir_all(folder)?;
    }
    let part = file.with_extension(format!("{}.part", std::process::id()));
    fs::write(&part, text).and_then(|()| fs::rename(&part, file))
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDENTITY: &str = "a GPU, 0000:01:00.0, CUDA 13.0, 32.0 GT/s PCIe x16";

    fn kept(change: impl FnOnce(String) -> String) -> Option<Profile> {
        let file = env::temp_dir().join(format!("kvortex-profile-{:?}.txt", std::thread::current().id()));
        write(&file, &change(text(IDENTITY, &Profile::ASSUMED))).unwrap();
        let found = read(&file, IDENTITY);
        fs::remove_file(&file).unwrap();
        found
    }

    #[test]
    fn a_profile_is_read_as_it_was_written() {
        assert_eq!(kept(|text| text), Some(Profile::ASSUMED));
    }

    #[test]
    fn what_is_no_profile_of_this_link_is_not_believed() {
        let broken: [fn(String) -> String; 7] = [
            |text| text.replace("x16", "x8"),
            |text| text.replace("profile 1", "profile 2"),
            |text| text.replace("store 55100", "store -1"),
            |text| text.replace("store 55100", "store NaN"),
            |text| text.replace("store 55100", "store"),
            |text| text[..text.len() / 2].to_owned(),
            |text| text + "more\n",
        ];
        for change in broken {
            assert_eq!(kept(change), None);
        }
        assert_eq!(read(Path::new("/no/such/file"), IDENTITY), None);
    }

    #[test]
    fn an_old_profile_is_measured_again() {
        let file = env::temp_dir().join(format!("kvortex-profile-old-{}.txt", std::process::id()));
        write(&file, &text(IDENTITY, &Profile::ASSUMED)).unwrap();
        let old = SystemTime::now() - KEPT - Duration::from_secs(60);
        fs::File::options().write(true).open(&file).unwrap().set_modified(old).unwrap();
        let found = read(&file, IDENTITY);
        fs::remove_file(&file).unwrap();
        assert_eq!(found, None);
    }

    #[test]
    fn names_are_those_of_the_link() {
        assert_eq!(file_name(IDENTITY), file_name(IDENTITY));
        assert_ne!(file_name(IDENTITY), file_name(&IDENTITY.replace("x16", "x8")));
        assert!(file_name(IDENTITY).starts_with("link-") && file_name(IDENTITY).len() == 25);
    }
}
