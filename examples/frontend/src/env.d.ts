interface ImportMetaEnv {
  readonly VITE_LOCAL_ENGINE_URL?: string;
  readonly VITE_CLOUD_ENGINE_URL?: string;
}
