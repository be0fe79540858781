//! A client of the CRI, which is how the kubelet calls containerd.

use std::path::Path;
use std::time::Duration;

use grpcio::{CallOption, Marshaller, Method, MethodType, pb_de, pb_ser};
use protobuf::EnumOrUnknown;

use crate::client::{self, CallResult};
use crate::proto::cri::{
    ContainerConfig, ContainerMetadata, CreateContainerRequest, CreateContainerResponse, Empty, ExecSyncRequest,
    ExecSyncResponse, ImageFsInfoResponse, ImageSpec, LinuxPodSandboxConfig, LinuxSandboxSecurityContext,
    NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxMetadata, PodSandboxRequest, PullImageRequest,
    PullImageResponse, RemoveImageRequest, RunPodSandboxRequest, RunPodSandboxResponse, StartContainerRequest,
};

macro_rules! methods {
    ($($constant:ident $name:literal $request:ty => $response:ty;)*) => {
        $(const $constant: Method<$request, $response> = Method {
            ty: MethodType::Unary,
            name: concat!("/runtime.v1.", $name),
            req_mar: Marshaller { ser: pb_ser, de: pb_de },
            resp_mar: Marshaller { ser: pb_ser, de: pb_de },
        };)*
    };
}

methods! {
    PULL_IMAGE "ImageService/PullImage" PullImageRequest => PullImageResponse;
    REMOVE_IMAGE "ImageService/RemoveImage" RemoveImageRequest => Empty;
    IMAGE_FS_INFO "ImageService/ImageFsInfo" Empty => ImageFsInfoResponse;
    RUN_POD "RuntimeService/RunPodSandbox" RunPodSandboxRequest => RunPodSandboxResponse;
    STOP_POD "RuntimeService/StopPodSandbox" PodSandboxRequest => Empty;
    REMOVE_POD "RuntimeService/RemovePodSandbox" PodSandboxRequest => Empty;
    CREATE_CONTAINER "RuntimeService/CreateContainer" CreateContainerRequest => CreateContainerResponse;
    START_CONTAINER "RuntimeService/StartContainer" StartContainerRequest => Empty;
    EXEC_SYNC "RuntimeService/ExecSync" ExecSyncRequest => ExecSyncResponse;
}

pub struct Cri {
    grpc: grpcio::Client,
}

/// A pod with one container.
pub struct Pod {
    pub id: String,
    pub container: String,
}

fn image(reference: &str) -> ImageSpec {
    ImageSpec { image: reference.to_owned(), ..ImageSpec::default() }
}

impl Cri {
    pub fn connect(socket: &Path) -> Self {
        Self { grpc: grpcio::Client::new(client::connect(socket)) }
    }

    fn try_call<Q: 'static, R: Unpin + 'static>(&self, method: &Method<Q, R>, request: &Q) -> CallResult<R> {
        let option = CallOption::default().timeout(Duration::from_mins(10)).wait_for_ready(true);
        client::call(&self.grpc, method, request, option)
    }

    #[track_caller]
    fn call<Q: 'static, R: Unpin + 'static>(&self, method: &Method<Q, R>, request: &Q) -> R {
        self.try_call(method, request).unwrap_or_else(|status| panic!("{}: {}", method.name, status.message()))
    }

    pub fn try_pull(&self, reference: &str) -> CallResult<()> {
        let request = PullImageRequest { image: Some(image(reference)).into(), ..PullImageRequest::default() };
        self.try_call(&PULL_IMAGE, &request).map(drop)
    }

    #[track_caller]
    pub fn pull(&self, reference: &str) {
        self.try_pull(reference).unwrap_or_else(|status| panic!("cannot pull {reference}: {}", status.message()));
    }

    pub fn try_remove(&self, reference: &str) -> CallResult<()> {
        let request = RemoveImageRequest { image: Some(image(reference)).into(), ..RemoveImageRequest::default() };
        self.try_call(&REMOVE_IMAGE, &request).map(drop)
    }

    #[track_caller]
    pub fn remove(&self, reference: &str) {
        self.try_remove(reference).unwrap_or_else(|status| panic!("cannot remove {reference}: {}", status.message()));
    }

    /// The mount points that the CRI reports for images; the kubelet reads the size of these file systems.
    #[track_caller]
    pub fn image_file_systems(&self) -> Vec<String> {
        let answer = self.call(&IMAGE_FS_INFO, &Empty::default());
        answer.image_filesystems.into_iter().map(|usage| usage.fs_id.unwrap_or_default().mountpoint).collect()
    }

    /// Runs a pod on the host's network. `name` must be unique on the machine.
    #[track_caller]
    pub fn run_pod(&self, name: &str, reference: &str, command: &[&str]) -> Pod {
        let host_network =
            NamespaceOption { network: EnumOrUnknown::new(NamespaceMode::NODE), ..NamespaceOption::default() };
        let security = LinuxSandboxSecurityContext {
            namespace_options: Some(host_network).into(),
            ..LinuxSandboxSecurityContext::default()
        };
        let linux =
            LinuxPodSandboxConfig { security_context: Some(security).into(), ..LinuxPodSandboxConfig::default() };
        let metadata = PodSandboxMetadata {
            name: name.to_owned(),
            uid: name.to_owned(),
            namespace: "default".to_owned(),
            ..PodSandboxMetadata::default()
        };
        let pod = PodSandboxConfig {
            metadata: Some(metadata).into(),
            linux: Some(linux).into(),
            ..PodSandboxConfig::default()
        };
        let request = RunPodSandboxRequest { config: Some(pod.clone()).into(), ..RunPodSandboxRequest::default() };
        let id = self.call(&RUN_POD, &request).pod_sandbox_id;
        let container = ContainerConfig {
            metadata: Some(ContainerMetadata { name: "main".to_owned(), ..ContainerMetadata::default() }).into(),
            image: Some(image(reference)).into(),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            ..ContainerConfig::default()
        };
        let request = CreateContainerRequest {
            pod_sandbox_id: id.clone(),
            config: Some(container).into(),
            sandbox_config: Some(pod).into(),
            ..CreateContainerRequest::default()
        };
        let container = self.call(&CREATE_CONTAINER, &request).container_id;
        let request = StartContainerRequest { container_id: container.clone(), ..StartContainerRequest::default() };
        self.call(&START_CONTAINER, &request);
        Pod { id, container }
    }

    #[track_caller]
    pub fn exec(&self, pod: &Pod, command: &[&str]) -> String {
        let request = ExecSyncRequest {
            container_id: pod.container.clone(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            timeout: 30,
            ..ExecSyncRequest::default()
        };
        let answer = self.call(&EXEC_SYNC, &request);
        assert_eq!(answer.exit_code, 0, "{}", String::from_utf8_lossy(&answer.stderr));
        String::from_utf8_lossy(&answer.stdout).into_owned()
    }

    #[track_caller]
    pub fn remove_pod(&self, pod: &Pod) {
        let request = PodSandboxRequest { pod_sandbox_id: pod.id.clone(), ..PodSandboxRequest::default() };
        self.call(&STOP_POD, &request);
        self.call(&REMOVE_POD, &request);
    }
}
